"""Which strategy and tile a layer takes on a GPU: `tiles` looks it up in `tables/`, `trial` tries
it on a small batch before it is used, `tune` has what a measurement may choose from.
"""
