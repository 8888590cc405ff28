"""Training recipes of the command line: data sets, networks, the loop and what it writes.

The rule, the layers and `swap` are not here: recipes build on `ghl`, and never the reverse.
"""
