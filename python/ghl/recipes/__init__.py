"""Training recipes of the command line: data sets, networks, the loop and what it writes.

The rule, the layers and `swap` are not here: recipes only call the public names of `ghl`.
"""
