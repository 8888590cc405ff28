"""What tests of layers share."""

import pytest

from ghl_kernels import native


@pytest.fixture(autouse=True)
def kernels_of_ours(monkeypatch):
    """Layers of tests have fewer rows than those that PyTorch's products are for on a CPU."""
    monkeypatch.setattr(native, "FEWEST_ROWS", 0)
