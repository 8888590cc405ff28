"""Cells whose work is to wait, in a module that processes import quickly."""

import time

from ghl.recipes.reproduce.cells import Cell


def slow(seconds, value):
    time.sleep(seconds)
    return {"value": value}


def make(n, seconds=0.0):
    return [
        Cell(f"c{i}", "tests.recipes.slow_cells:slow", {"seconds": seconds, "value": i})
        for i in range(n)
    ]
