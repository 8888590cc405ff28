"""What the update of a layer costs on the machine at hand, against how others write it.

`ghl bench` prints it for a model and tunes tiles; the repository's `bench/` commits results. No
kernel lives here, and nothing here decides which one runs.
"""
