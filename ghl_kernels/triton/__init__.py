"""The operators on a GPU, by Triton: one kernel a file, one implementation a file.

`fused`, `stored` and `library` are what the dispatcher picks from; `tiles` holds the tuned choices.
Importing this package needs Triton; nothing outside it does.
"""
