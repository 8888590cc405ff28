"""`ghl.synchronize`: sums are held over backwards and ranks, and merged once, before a step.

`entry` is the function, `synchronizer` its handle, `held` and `shards` the sums of one weight;
`merging` is what a step does, `dtypes` in which dtype ranks use a weight, `groups` whose ranks have
the parts of a batch, `wrapped` what is put around models and optimizers, `other_optimizers` and
`refusals` what must not happen.
"""

from ghl.deferred.entry import synchronize

__all__ = ["synchronize"]
