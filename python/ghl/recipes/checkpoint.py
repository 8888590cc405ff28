"""Checkpoints, and the states of generators in them.

What a checkpoint means to a run is the trainer's business; here it is a dictionary with a version.
"""

import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ghl_kernels.files import write_atomic

VERSION = 3
TENSORS = ("model", "optimizer", "average", "sharded")
PROGRESS = ("epoch", "step", "schedule", "scaler", "ranks", "history")
FIELDS = frozenset(("version", "arch", "rule", "data", *TENSORS, *PROGRESS))


class NotWritten(ValueError):
    """The disk is full, and the checkpoint before is still the last one."""


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint of the fields in FIELDS, atomically; the version is added here.

    OSError if it cannot be written.
    """
    try:
        write_atomic(path, lambda file: torch.save({"version": VERSION, **state}, file))
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # torch's writer fails again when it is closed
            raise error.__context__ from None
        raise


def load(path: Path, *, arch: str, rule: dict[str, Any]) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; nothing in it is executed.

    ValueError if it is damaged, of another version, or of another architecture or rule.
    """
    state = _read(path)
    if state.get("version") != VERSION:
        raise ValueError(
            f"checkpoint {path}: expected version {VERSION}, found {state.get('version')!r}"
        )
    missing = FIELDS - state.keys()
    if missing:
        raise ValueError(f"checkpoint {path}: expected the fields {', '.join(sorted(missing))}")
    for field, expected in (("arch", arch), ("rule", rule)):
        if state[field] != expected:
            raise ValueError(
                f"checkpoint {path}: expected {field} {expected!r}, found {state[field]!r}"
            )
    return state


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path}: expected a file, found none")
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()  # torch.load itself does not verify the checksums
        if broken is not None:
            raise zipfile.BadZipFile(f"bad checksum of {broken}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"checkpoint {path}: expected an intact checkpoint ({reason})") from error
    if not isinstance(state, dict):
        raise ValueError(f"checkpoint {path}: expected a dictionary, found {type(state).__name__}")
    return state


def seed_everything(seed: int) -> None:
    """Seed every generator that a run may draw from."""
    random.seed(seed)
    np.random.seed(np.random.SeedSequence(seed).generate_state(4))
    torch.manual_seed(seed)


def random_states(order: torch.Generator) -> dict[str, Any]:
    """The state of Python's, numpy's and torch's generators and of the sampler's, `order`."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "order": order.get_state(),
    }


def restore_random_states(states: dict[str, Any], order: torch.Generator) -> None:
    """Put every generator back to where `random_states` found it."""
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
    order.set_state(states["order"])
