"""The operators on a GPU, by Triton: one kernel a file, one implementation a file.

`fused`, `stored`, `library`, `library_patches` and `sm90_stored` are what the dispatcher picks
from, by `ghl_kernels.tuning.tiles`.
Importing its modules needs Triton; nothing outside them does.
"""
