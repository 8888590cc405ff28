"""The tensors of a sharded run, written by all its processes at once, beside the checkpoint.

A directory of torch.distributed.checkpoint counts from when the checkpoint names it; so a kill, or
a full disk, leaves the one before.
"""

import shutil
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

PREFIX = "shards-"


def name(epoch: int, step: int) -> str:
    """The directory of the tensors after `step` steps of an epoch."""
    return f"{PREFIX}{epoch}-{step}"


def save(path: Path, tensors: dict[str, Any]) -> None:
    """Write the tensors, every process its shards; OSError on all if one could not."""
    try:
        dcp.save(tensors, checkpoint_id=path)
    except CheckpointException as error:
        reasons = [e[0] if isinstance(e, tuple) else e for e in error.failures.values()]
        for reason in reasons:
            if isinstance(reason, OSError):
                raise reason from error
        raise


def load(path: Path, tensors: dict[str, Any]) -> None:
    """Read into the tensors in place, however they are sharded now, or not at all.

    ValueError if the directory is missing, damaged or of other tensors.
    """
    try:
        dcp.load(tensors, checkpoint_id=path)
    except (CheckpointException, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"checkpoint {path}: expected intact shards ({reason})") from error


def remove(path: Path) -> None:
    """Delete a directory of tensors, or what there is of it."""
    shutil.rmtree(path, ignore_errors=True)


def keep_only(out: Path, kept: str | None) -> None:
    """Delete all directories of tensors in `out` but the one that the checkpoint names."""
    for path in out.glob(f"{PREFIX}*"):
        if path.name != kept:
            remove(path)
