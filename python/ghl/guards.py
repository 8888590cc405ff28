"""What must not happen to an update made in backward: sums or scales that only G can bear.

Each guard raises one error that names the remedy, `ghl.synchronize(model, optimizer)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

REMEDY = "call ghl.synchronize(model, optimizer) once before training"


def mark_update(update: Tensor) -> None:
    """Let `is_update` know that this gradient is an update."""
    update._ghl_update = True  # type: ignore[attr-defined]


def unmark_update(grad: Tensor) -> None:
    """Let a gradient that was an update be an ordinary one."""
    del grad._ghl_update  # type: ignore[attr-defined]


def is_update(grad: Tensor | None) -> bool:
    return getattr(grad, "_ghl_update", False)


def check_alone(weight: Tensor) -> None:
    """An update merged on each rank and averaged afterwards is wrong: sign(mean) ≠ mean(sign)."""
    if hasattr(weight, "device_mesh"):
        raise RuntimeError(
            "a rule made its update of a weight that is sharded over ranks, where G and H0 must "
            f"be summed over the ranks before the merge: {REMEDY}"
        )
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise RuntimeError(
            f"a rule made its update in a process group of {dist.get_world_size()} ranks, where "
            f"G and H0 must be summed over the ranks before the merge: {REMEDY} (after wrapping "
            "the model), or use rule='bp'"
        )


def check_whole(layer: nn.Module) -> None:
    """FSDP adds what each backward leaves in an unsharded weight's gradient to a shard's; a weight
    that is still a DTensor in its forward is nobody's who would sum over ranks."""
    if hasattr(layer.weight, "device_mesh"):
        raise RuntimeError(
            f"weight of {type(layer).__name__} is a DTensor in its forward (tensor parallelism?), "
            "which is not supported: give the layer rule='bp', or leave it out of the swap"
        )
    if getattr(layer, "_is_fsdp_managed_module", False):
        raise RuntimeError(
            f"{type(layer).__name__} is sharded by FSDP, where G and H0 must be summed over the "
            f"ranks before the merge: {REMEDY} (after fully_shard, before the first forward), "
            "or use rule='bp'"
        )


def unscale(keyset: Any, grads: Sequence[Tensor], found_inf: Tensor, inv_scale: Tensor) -> Any:
    """What every way through a GradScaler calls to divide gradients by the scale of the loss."""
    if any(is_update(grad) for grad in grads):
        raise RuntimeError(
            "a GradScaler would divide an update by the scale of the loss, which an update does "
            f"not have: {REMEDY}, which scales G before the merge"
        )
    operator = torch.ops.aten._amp_foreach_non_finite_check_and_unscale_.default
    return operator.redispatch(
        keyset & torch._C._after_autograd_keyset, grads, found_inf, inv_scale
    )


# An update has been made when scaling is first seen, and it is scaled in place by this operator
# alone; a check here costs other models nothing, and changes nothing for them.
_aten = torch.library.Library("aten", "IMPL")
for _key in ("AutogradCPU", "AutogradCUDA"):
    _aten.impl("_amp_foreach_non_finite_check_and_unscale_", unscale, _key, with_keyset=True)
