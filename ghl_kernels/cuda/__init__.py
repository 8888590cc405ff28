"""The operators on a GPU, by the kernels of csrc/cuda, which are compiled ahead of time.

`fused`, `sm90` and `sm90_exchanged` are what the dispatcher picks from. Nothing here needs Triton.
"""
