"""The memory orders of activations and weights that kernels read and write, and what it costs to
bring a tensor into one.

A weight's row is a neuron's weights in memory order; activations are matrices (rows, channels).
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_OFFSET = 2**31 - 1
LARGEST_SIZE = 2**31 - 2**17  # 32-bit numbers that a step over the last tile cannot overflow
LARGEST_TILE = 256  # rows; offsets inside a tile are 32-bit


def is_channels_last(t: Tensor) -> bool:
    """Whether images, or a neuron's weights, lie in the order (height, width, channels) alone."""
    return (
        t.dim() == 4
        and not t.is_contiguous()
        and t.is_contiguous(memory_format=torch.channels_last)
    )


def memory_format(w: Tensor) -> torch.memory_format:
    return torch.channels_last if is_channels_last(w) else torch.contiguous_format


def empty_rows(w: Tensor, dtype: torch.dtype) -> Tensor:
    """Empty, of the shape of w: channels_last if w is, else contiguous.

    With the very strides of a w in either order, which differ where a dimension is one: a result
    with others would have to be copied.
    """
    if w.is_contiguous() or is_channels_last(w):
        return torch.empty_like(w, dtype=dtype)
    return torch.empty(w.shape, dtype=dtype, device=w.device)


def as_rows(t: Tensor, channels_last: bool) -> Tensor:
    """(out_channels, rest) in the memory order of a weight: a view of a t with its strides."""
    rows = t.movedim(1, -1) if channels_last else t
    return rows.reshape(t.shape[0], t.shape[1:].numel())


def from_rows(rows: Tensor, w: Tensor) -> Tensor:
    """The inverse of `as_rows`: a view with the shape of w; what has that shape, as it is."""
    if rows.shape == w.shape:
        return rows
    if not is_channels_last(w):
        return rows.view(w.shape)
    out_channels, channels, *kernel_size = w.shape
    return rows.view(out_channels, *kernel_size, channels).movedim(-1, 1)


def in_order_of(w: Tensor, t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """t in `dtype` (its own by default) and the memory order of the sums of w; a copy only if it
    is not."""
    if dtype is None or t.dtype == dtype:
        if w.is_contiguous():
            return t.contiguous()
        if t.stride() == w.stride() and is_channels_last(w):
            return t
    return t.to(dtype or t.dtype).contiguous(memory_format=memory_format(w))


def like_weight(result: Tensor, w: Tensor, dtype: torch.dtype) -> Tensor:
    """`result`, dense, with the strides of torch.empty_like(w): a copy only for a w in neither
    layout."""
    if w.stride() == result.stride() and dtype == result.dtype:
        return result
    like = torch.empty_like(w, dtype=dtype)
    if like.stride() == result.stride() and dtype == result.dtype:
        return result
    return like.copy_(result)


def fits(matrix: Tensor) -> bool:
    """Whether offsets inside a tile of this matrix are below 2**31."""
    rows, columns = matrix.stride()
    return LARGEST_TILE * rows + matrix.shape[1] * columns <= LARGEST_OFFSET


def view_as_matrix(t: Tensor) -> Tensor | None:
    """(rows, channels) of a t (rows, channels) or (N, channels, H, W); None if that is no view."""
    last = t.movedim(1, -1)
    try:
        matrix = last.view(-1, t.shape[1])
    except RuntimeError:
        return None
    return matrix if fits(matrix) else None


def as_matrix(t: Tensor) -> Tensor:
    """(rows, channels) of a t (rows, channels) or (N, channels, H, W); a copy if it must be."""
    view = view_as_matrix(t)
    return t.movedim(1, -1).contiguous().view(-1, t.shape[1]) if view is None else view


def small_images(x: Tensor) -> bool:
    """Whether offsets inside an image of x (N, C, H, W) are below 2**31."""
    return sum(n * s for n, s in zip(x.shape[1:], x.stride()[1:], strict=True)) <= LARGEST_OFFSET


def channels_innermost(x: Tensor) -> bool:
    """Whether an image of x has its channels side by side, and 32-bit offsets."""
    return (x.stride(1) == 1 or x.shape[1] == 1) and small_images(x)


def as_images(x: Tensor) -> Tensor:
    """x with its channels innermost; a copy if they are not."""
    return x if channels_innermost(x) else x.contiguous(memory_format=torch.channels_last)


def copied_bytes(x: Tensor, *signals: Tensor) -> int:
    """Bytes read and written to bring x, y and g into the order that convolutions read."""
    if all(t.is_contiguous(memory_format=torch.channels_last) for t in signals):
        signals = ()
    copied = [] if channels_innermost(x) else [x]
    copied += [t for t in signals if view_as_matrix(t) is None]
    return sum(2 * t.numel() * t.element_size() for t in copied)


def in_chunks(t: Tensor) -> Tensor:
    """t with its last dimension side by side, and all others at multiples of 16 bytes that do not
    coincide: as the tensor memory accelerator reads. A copy if it must be."""
    numbers = 16 // t.element_size()
    apart = all(
        s > 0 and s % numbers == 0 for s, n in zip(t.stride(), t.shape[:-1], strict=False) if n > 1
    )
    if t.stride(-1) == 1 and t.data_ptr() % 16 == 0 and apart:
        return t
    width = -(-t.shape[-1] // numbers) * numbers
    room = torch.empty(*t.shape[:-1], width, dtype=t.dtype, device=t.device)
    return room[..., : t.shape[-1]].copy_(t)
