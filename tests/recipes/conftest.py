"""A run small enough to train within a second, and the real data where a machine has it."""

from pathlib import Path
from typing import Any

import pytest

SHARED = Path(__file__).parents[3] / "shared" / "data" / "fashion-mnist"


@pytest.fixture
def small() -> dict[str, Any]:
    """Settings of a run of three epochs with two steps each."""
    return {"width": 0.05, "epochs": 3, "limit_train": 128, "limit_test": 64, "device": "cpu"}


@pytest.fixture
def fashion_mnist() -> str:
    """The directory of the real Fashion-MNIST files."""
    if not SHARED.is_dir():
        pytest.skip(f"no Fashion-MNIST in {SHARED}")
    return str(SHARED)
