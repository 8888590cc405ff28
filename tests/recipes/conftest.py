"""A run small enough to train within a second, and the real data where a machine has it."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SHARED = Path(__file__).parents[3] / "shared" / "data" / "fashion-mnist"


@pytest.fixture
def small() -> dict[str, Any]:
    """Settings of a run of three epochs with two steps each."""
    return {"width": 0.05, "epochs": 3, "limit_train": 128, "limit_test": 64, "device": "cpu"}


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Whoever started the tests may ignore Ctrl-C, as a shell does for what is in its background;
    their own processes would inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def fashion_mnist() -> str:
    """The directory of the real Fashion-MNIST files."""
    if not SHARED.is_dir():
        pytest.skip(f"no Fashion-MNIST in {SHARED}")
    return str(SHARED)
