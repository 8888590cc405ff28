"""What a call did, written on a tape and played for other tensors; `ghl_kernels.replay` says for
which.

`recorder` writes, `tape` plays in Python, and `player` hands tapes to csrc/replay, which plays them
without; `launches` launches Triton's kernels without Triton.
"""
