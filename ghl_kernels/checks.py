"""What the operators accept, checked before any memory is touched.

One clear error per mistake: the argument, what it was, what it must be.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # that GPU kernels and autocast take


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over activations of `dtype` are kept and returned."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def output_size(
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, ...]:
    """Spatial output size of a convolution, as nn.Conv2d documents it."""
    geometry = zip(size, kernel_size, stride, padding, dilation, strict=True)
    return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in geometry)


def check_dtype(what: str, dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        accepted = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TypeError(f"{what} {dtype}, must be one of {accepted}")


def check_float(**tensors: Tensor) -> None:
    for name, t in tensors.items():
        check_dtype(f"{name} has dtype", t.dtype)
        if t.layout != torch.strided:
            raise TypeError(f"{name} has layout {t.layout}, must be torch.strided")


def check_device(first: Tensor, **tensors: Tensor) -> None:
    for name, t in tensors.items():
        if t.device != first.device:
            raise ValueError(f"{name} is on {t.device}, must be on {first.device} like the rest")


def check_shape(name: str, t: Tensor, shape: Sequence[int], meaning: str) -> None:
    if tuple(t.shape) != tuple(shape):
        raise ValueError(
            f"{name} has shape {tuple(t.shape)}, must be {tuple(shape)}, that is {meaning}"
        )


def check_rank(name: str, t: Tensor, rank: int, meaning: str) -> None:
    if t.dim() != rank:
        raise ValueError(
            f"{name} has {t.dim()} dimensions (shape {tuple(t.shape)}), must have {rank}: {meaning}"
        )


def check_activations(x: Tensor, y: Tensor, g: Tensor, w: Tensor) -> None:
    check_float(x=x, y=y, g=g, w=w)
    check_device(x, y=y, g=g, w=w)
    for name, t in (("y", y), ("g", g)):
        if t.dtype != x.dtype:
            raise TypeError(f"{name} has dtype {t.dtype}, must be {x.dtype} like x")
    if w.dtype not in (x.dtype, sum_dtype(x.dtype)):
        raise TypeError(f"w has dtype {w.dtype}, must be {x.dtype} like x or {sum_dtype(x.dtype)}")


def check_linear(x: Tensor, y: Tensor, g: Tensor, w: Tensor) -> None:
    check_activations(x, y, g, w)
    check_rank("x", x, 2, "rows, in_features")
    check_rank("w", w, 2, "out_features, in_features")
    if w.shape[0] == 0:
        raise ValueError("w has no neurons: out_features must be at least 1")
    if x.shape[1] != w.shape[1]:
        raise ValueError(f"x has {x.shape[1]} in_features, must have {w.shape[1]} like w")
    for name, t in (("y", y), ("g", g)):
        check_shape(name, t, (x.shape[0], w.shape[0]), "rows of x, out_features of w")


def check_conv2d(
    x: Tensor,
    y: Tensor,
    g: Tensor,
    w: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    check_activations(x, y, g, w)
    check_rank("x", x, 4, "batch, in_channels, height, width")
    check_rank("w", w, 4, "out_channels, in_channels / groups, kernel height, kernel width")
    for name, values, least in (
        ("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)
    ):  # fmt: skip
        if len(values) != 2 or min(values) < least:
            raise ValueError(f"{name} is {list(values)}, must be two integers of at least {least}")
    if w.numel() == 0:
        raise ValueError(f"w has shape {tuple(w.shape)}, must have no dimension of size 0")
    if groups < 1 or w.shape[0] % groups:
        raise ValueError(f"groups is {groups}, must divide out_channels, which is {w.shape[0]}")
    if x.shape[1] != w.shape[1] * groups:
        raise ValueError(
            f"x has {x.shape[1]} in_channels, must have {w.shape[1] * groups}: "
            f"w has {w.shape[1]} for each of {groups} groups"
        )
    size = output_size(x.shape[2:], w.shape[2:], stride, padding, dilation)
    if min(size) < 1:
        raise ValueError(
            f"x has spatial size {tuple(x.shape[2:])}, too small for kernel {tuple(w.shape[2:])} "
            f"with padding {list(padding)} and dilation {list(dilation)}"
        )
    for name, t in (("y", y), ("g", g)):
        check_shape(name, t, (x.shape[0], w.shape[0], *size), "the output of this convolution")


def check_merge(
    G: Tensor, H0: Tensor, totals: Tensor, w: Tensor, used_as: torch.dtype | None = None
) -> None:
    check_float(G=G, H0=H0, totals=totals, w=w)
    if used_as is not None:
        check_dtype("used_as is", used_as)
    check_device(G, H0=H0, totals=totals, w=w)
    if w.dim() < 2 or w.shape[0] == 0:
        raise ValueError(f"w has shape {tuple(w.shape)}, must be (out_channels >= 1, ...)")
    check_shape("G", G, w.shape, "the shape of w")
    rows = w.shape[0], w.shape[1:].numel()
    if H0.shape != rows:
        check_shape("H0", H0, w.shape, f"the shape of w, or {rows}, its rows")
    check_shape("totals", totals, (w.shape[0] + 1,), "sum of u for each neuron, number of rows")


def check_foreach_merge(
    G: Sequence[Tensor],
    H0: Sequence[Tensor],
    totals: Sequence[Tensor],
    w: Sequence[Tensor],
    used_as: torch.dtype | None = None,
) -> None:
    if len(G) == 0:
        raise ValueError("G is an empty list, must hold one tensor for each layer")
    for name, tensors in (("H0", H0), ("totals", totals), ("w", w)):
        if len(tensors) != len(G):
            raise ValueError(f"{name} has {len(tensors)} tensors, must have {len(G)} like G")
    for number, layer in enumerate(zip(G, H0, totals, w, strict=True)):
        try:
            check_merge(*layer, used_as)
            check_device(G[0], G=layer[0])
        except (TypeError, ValueError) as error:
            raise type(error)(f"layer {number} of {len(G)}: {error}") from None


def check_logsumexp(y: Tensor, dim: int) -> None:
    check_float(y=y)
    if not -y.dim() <= dim < y.dim():
        raise ValueError(f"dim is {dim}, must be a dimension of y, which has {y.dim()}")
    if y.shape[dim] == 0:
        raise ValueError(f"y has shape {tuple(y.shape)}: no neurons along dimension {dim}")
