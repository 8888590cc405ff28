"""The operators on a GPU, by the kernels of csrc/cuda, which are compiled ahead of time.

`fused` and `sm90` are what the dispatcher picks from. Nothing here needs Triton.
"""
