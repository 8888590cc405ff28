"""Kernels and operators of global-guided Hebbian learning, correct with nothing compiled.

The operators are `torch.ops.ghl_kernels.*`, listed in `ghl_kernels.ops`; `reference` defines what
they compute; `backend`, `force` and `last` say and decide which implementation runs.
"""

from torch import Tensor

from ghl_kernels import dispatch, flops, library, ops, reference
from ghl_kernels.dispatch import Backend, force
from ghl_kernels.problem import Problem
from ghl_kernels.registration import current
from ghl_kernels.rule import PRESETS, Rule, check_choice

__all__ = [
    "PRESETS",
    "Backend",
    "Problem",
    "Rule",
    "backend",
    "flops",
    "force",
    "last",
    "ops",
    "reference",
]

library.serve(cpu=library.load("ghl_kernels_cpu"), cuda=library.load("ghl_kernels_cuda"))


def backend(operator: str, first: Tensor, problem: Problem | None = None) -> Backend:
    """Which implementation `operator` takes for tensors like `first` (its first argument), and why.

    problem: the sizes of a layer, by which a pair or an update goes. On a GPU the kernels are tried
    first, and compiled for that, as by a call. Raises ValueError for an unknown operator, and for a
    layer's operator without a problem.
    """
    check_choice("operator", operator, ops.OPERATORS)
    if problem is None and operator in ops.TAKES_ACTIVATIONS:
        raise ValueError(
            f"problem is None, must be the sizes of the layer: {operator} goes by them"
        )
    with current(first.device):
        return dispatch.choose(operator, first, problem)


def last(operator: str) -> Backend | None:
    """The implementation that ran the most recent call of `operator`, None before the first.

    What layers call, `conv2d_pair_no_grad` say, counts as a call of `conv2d_pair`. Raises
    ValueError for an unknown operator.
    """
    check_choice("operator", operator, ops.OPERATORS)
    return dispatch.last(operator)
