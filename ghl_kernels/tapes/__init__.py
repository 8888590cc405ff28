"""Calls like earlier ones: what those did is written on a tape, and played for other tensors.

`replay` says which calls are alike, `recorder` writes, `tape` plays in Python, and `player` hands
tapes to csrc/replay, which plays them without; `launches` launches Triton's kernels without Triton.
"""
