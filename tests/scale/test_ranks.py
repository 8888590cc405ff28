"""Two and three processes are one process with the whole batch: weights after ten steps."""

import pytest

from .world import run, scenarios


def assert_passed(module: str, world: int, name: str) -> None:
    for rank, said in enumerate(run(module, world)[name]):
        assert said.endswith(" passed"), f"rank {rank} of {world}, {said}"


@pytest.mark.parametrize("name", scenarios("ddp"))
@pytest.mark.parametrize("world", [2, 3])
def test_ddp(world: int, name: str) -> None:
    """Every rank has the weights of one process, and all the same bits."""
    assert_passed("ddp", world, name)


@pytest.mark.parametrize("name", scenarios("fsdp"))
@pytest.mark.parametrize("world", [2, 3])
def test_fsdp(world: int, name: str) -> None:
    """The shards of all ranks together are the weights of one process."""
    assert_passed("fsdp", world, name)


@pytest.mark.parametrize("name", scenarios("errors"))
@pytest.mark.parametrize("world", [2, 3])
def test_errors(world: int, name: str) -> None:
    """What is wrong is an error on every rank, and none hangs."""
    assert_passed("errors", world, name)
