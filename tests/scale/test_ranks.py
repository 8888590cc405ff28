"""Two and three processes are one process with the whole batch: weights after ten steps."""

import pytest

from .world import run, scenarios


@pytest.mark.parametrize("name", scenarios())
@pytest.mark.parametrize("world", [2, 3])
def test_ranks(world: int, name: str) -> None:
    """Every rank comes to the end of the scenario with what it must have."""
    for rank, said in enumerate(run(world)[name]):
        assert said.endswith(" passed"), f"rank {rank} of {world}, {said}"
