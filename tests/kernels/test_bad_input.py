"""One clear error for each mistake: the argument, what it was, what it must be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import Conv, Linear
from torch import Tensor

import ghl_kernels
from ghl_kernels import library, ops

NAMES = ("x", "y", "g", "w")
LINEAR, CONV = Linear(6, 3, 4), Conv(2, 4, (6, 6), 8, groups=2)
LAYERS = {"linear": LINEAR, "conv2d": CONV}
MERGE = {"G": (4, 3), "H0": (4, 3), "totals": (5,), "w": (4, 3)}


def call(kind: str, **changes: object) -> None:
    """A valid call of the pair and of the update, but for the changes."""
    layer = LAYERS[kind]
    arguments = dict(zip(NAMES, layer.tensors(), strict=True))
    if isinstance(layer, Conv):
        names = ("stride", "padding", "dilation", "groups")
        arguments.update(zip(names, layer.geometry, strict=True))
    arguments.update(competition="softmax", tau=1.0)
    arguments.update(changes)
    getattr(torch.ops.ghl_kernels, f"{kind}_pair")(**arguments)


def changed(kind: str, name: str, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    return {name: change(LAYERS[kind].tensors()[NAMES.index(name)])}


def call_merge(**changes: object) -> None:
    arguments: dict[str, object] = {name: torch.randn(shape) for name, shape in MERGE.items()}
    arguments.update(decay="oja", gate="sign", normalize="absmax")
    torch.ops.ghl_kernels.merge(**{**arguments, **changes})


kinds = pytest.mark.parametrize("kind", LAYERS)
names = pytest.mark.parametrize("name", NAMES)


@kinds
def test_the_call_these_tests_spoil_is_valid(kind: str) -> None:
    call(kind)
    call_merge()


@kinds
@names
@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool], ids=str)
def test_only_float_dtypes(kind: str, name: str, dtype: torch.dtype) -> None:
    expected = f"^{name} has dtype {dtype}, must be one of float32, float64, bfloat16, float16"
    with pytest.raises(TypeError, match=expected):
        call(kind, **changed(kind, name, lambda t: t.to(dtype)))


@kinds
@names
def test_only_dense_tensors(kind: str, name: str) -> None:
    expected = f"^{name} has layout torch.sparse_coo, must be torch.strided"
    with pytest.raises(TypeError, match=expected):
        call(kind, **changed(kind, name, Tensor.to_sparse))


@kinds
@pytest.mark.parametrize("name", ["y", "g", "w"])
def test_one_device(kind: str, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} is on meta, must be on cpu like the rest"):
        call(kind, **changed(kind, name, lambda t: t.to("meta")))


@kinds
@pytest.mark.parametrize("name", ["y", "g"])
def test_activations_of_one_dtype(kind: str, name: str) -> None:
    expected = f"^{name} has dtype torch.float64, must be torch.float32 like x"
    with pytest.raises(TypeError, match=expected):
        call(kind, **changed(kind, name, Tensor.double))


@kinds
def test_weight_in_the_dtype_of_x_or_of_its_sums(kind: str) -> None:
    with pytest.raises(
        TypeError, match=r"^w has dtype torch.float16, must be torch.float32 like x"
    ):
        call(kind, **changed(kind, "w", Tensor.half))


@pytest.mark.parametrize(("kind", "rank"), [("linear", 2), ("conv2d", 4)])
@pytest.mark.parametrize("name", ["x", "w"])
def test_rank(kind: str, rank: int, name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^{name} has {rank + 1} dimensions .*must have {rank}: "
    ):
        call(kind, **changed(kind, name, lambda t: t[None]))


@pytest.mark.parametrize(
    ("kind", "shape"), [("linear", r"\(6, 4\)"), ("conv2d", r"\(2, 8, 4, 4\)")]
)
@pytest.mark.parametrize("name", ["y", "g"])
def test_output_shape(kind: str, shape: str, name: str) -> None:
    """One neuron, one row or one dimension more or fewer than the layer has."""
    for change in (lambda t: t[:, 1:], lambda t: t[1:], lambda t: t[None], lambda t: t[..., 1:]):
        with pytest.raises(ValueError, match=rf"^{name} has shape .*, must be {shape}, that is"):
            call(kind, **changed(kind, name, change))


def test_inputs_of_a_linear_layer() -> None:
    with pytest.raises(ValueError, match=r"^x has 2 in_features, must have 3 like w"):
        call("linear", **changed("linear", "x", lambda t: t[:, 1:]))


def test_inputs_of_a_convolution() -> None:
    expected = "^x has 3 in_channels, must have 4: w has 2 for each of 2 groups"
    with pytest.raises(ValueError, match=expected):
        call("conv2d", **changed("conv2d", "x", lambda t: t[:, 1:]))


def test_no_neurons() -> None:
    _, y, g, w = LINEAR.tensors()
    with pytest.raises(ValueError, match=r"^w has no neurons: out_features must be at least 1"):
        call("linear", y=y[:, :0], g=g[:, :0], w=w[:0])
    with pytest.raises(ValueError, match=r"^w has shape \(0, 2, 3, 3\), must have no dimension of"):
        call("conv2d", **changed("conv2d", "w", lambda t: t[:0]))


@pytest.mark.parametrize("groups", [0, -1, 3, 16])
def test_groups_divide_the_neurons(groups: int) -> None:
    with pytest.raises(
        ValueError, match=f"^groups is {groups}, must divide out_channels, which is 8"
    ):
        call("conv2d", groups=groups)


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [
        ("stride", [0, 1], 1),
        ("stride", [1], 1),
        ("stride", [1, 1, 1], 1),
        ("padding", [0, -1], 0),
        ("padding", [], 0),
        ("dilation", [1, 0], 1),
    ],
)
def test_geometry(name: str, value: list[int], least: int) -> None:
    expected = rf"^{name} is \[.*\], must be two integers of at least {least}$"
    with pytest.raises(ValueError, match=expected):
        call("conv2d", **{name: value})


def test_an_image_smaller_than_the_kernel() -> None:
    with pytest.raises(
        ValueError, match=r"^x has spatial size \(2, 6\), too small for kernel \(3, 3\)"
    ):
        call("conv2d", **changed("conv2d", "x", lambda t: t[:, :, :2]))
    with pytest.raises(
        ValueError, match=r"too small for .* with padding \[0, 0\] and dilation \[3, 1\]"
    ):
        call("conv2d", dilation=[3, 1])


@kinds
@pytest.mark.parametrize("tau", [0.0, -1.0, float("nan"), float("inf"), -float("inf")])
def test_tau(kind: str, tau: float) -> None:
    expected = f"^tau is {tau}, must be finite and greater than 0"
    with pytest.raises(ValueError, match=expected):
        call(kind, tau=tau)
    with pytest.raises(ValueError, match=expected):
        torch.ops.ghl_kernels.logsumexp(torch.randn(3, 3), tau, 1)


@kinds
def test_competition(kind: str) -> None:
    with pytest.raises(ValueError, match=r"^competition is 'sofmax'.*did you mean 'softmax'"):
        call(kind, competition="sofmax")


@pytest.mark.parametrize("argument", ["decay", "gate", "normalize"])
def test_choices_of_the_merge(argument: str) -> None:
    """Also by the update in one call, and there before any sum is computed."""
    expected = f"^{argument} is 'bogus', must be one of "
    with pytest.raises(ValueError, match=expected):
        call_merge(**{argument: "bogus"})
    choices = {"decay": "oja", "gate": "sign", "normalize": "absmax", argument: "bogus"}
    before = ghl_kernels.last("linear_pair")
    with pytest.raises(ValueError, match=expected):
        torch.ops.ghl_kernels.linear_update(*LINEAR.tensors(), "softmax", 1.0, *choices.values())
    with pytest.raises(ValueError, match=expected):
        torch.ops.ghl_kernels.conv2d_update(
            *CONV.tensors(), *CONV.geometry, "softmax", 1.0, *choices.values()
        )
    assert ghl_kernels.last("linear_pair") is before


@pytest.mark.parametrize(
    ("name", "shape", "meaning"),
    [
        ("G", (3, 4), "the shape of w"),
        ("H0", (4, 3, 1), "the shape of w"),
        ("totals", (4,), "sum of u for each neuron, number of rows"),
        ("totals", (5, 1), "sum of u for each neuron, number of rows"),
    ],
)
def test_shapes_of_the_merge(name: str, shape: tuple[int, ...], meaning: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} has shape .*, must be .*, that is {meaning}"):
        call_merge(**{name: torch.randn(shape)})


def test_rows_of_the_merge() -> None:
    w = torch.randn(4, 3, 2, 1)
    wanted = r"^H0 has shape \(4, 5\), must be .*, that is the shape of w, or \(4, 6\), its rows$"
    with pytest.raises(ValueError, match=wanted):
        torch.ops.ghl_kernels.merge(w, torch.randn(4, 5), torch.ones(5), w, "oja", "sign", "none")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_what_a_weight_cannot_be_rounded_to(dtype: torch.dtype) -> None:
    tensors = [torch.ones(shape) for shape in MERGE.values()]
    expected = f"used_as is {dtype}, must be one of float32, float64, bfloat16, float16$"
    for merge, arguments in (
        (torch.ops.ghl_kernels.merge, tensors),
        (torch.ops.ghl_kernels.foreach_merge, [[t] for t in tensors]),
    ):
        with pytest.raises(TypeError, match=expected):
            merge(*arguments, "oja", "sign", "none", dtype)


@pytest.mark.parametrize("shape", [(4,), (0, 3), ()])
def test_weight_of_the_merge(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^w has shape .*, must be \(out_channels >= 1, \.\.\.\)"):
        call_merge(w=torch.randn(shape))


@pytest.mark.parametrize("name", MERGE)
def test_tensors_of_the_merge(name: str) -> None:
    with pytest.raises(TypeError, match=f"^{name} has dtype torch.int32, must be one of float32"):
        call_merge(**{name: torch.ones(MERGE[name], dtype=torch.int32)})
    with pytest.raises(TypeError, match=f"^{name} has layout torch.sparse_coo"):
        call_merge(**{name: torch.ones(MERGE[name]).to_sparse()})
    if name != "G":
        arguments = {
            n: torch.ones(s, device="meta" if n == name else "cpu") for n, s in MERGE.items()
        }
        with pytest.raises(ValueError, match=f"^{name} is on meta, must be on cpu like the rest"):
            torch.ops.ghl_kernels.merge(**arguments, decay="oja", gate="sign", normalize="absmax")


def test_lists_of_the_foreach_merge() -> None:
    choices = ("oja", "sign", "absmax")
    lists = [[torch.ones(shape)] * 2 for shape in MERGE.values()]
    with pytest.raises(ValueError, match=r"^G is an empty list, must hold one tensor for each"):
        ops.foreach_merge([], [], [], [], *choices)
    with pytest.raises(ValueError, match=r"^totals has 1 tensors, must have 2 like G"):
        ops.foreach_merge(lists[0], lists[1], lists[2][:1], lists[3], *choices)
    lists[1] = [lists[1][0], torch.ones(3)]
    with pytest.raises(ValueError, match=r"^layer 1 of 2: H0 has shape"):
        ops.foreach_merge(*lists, *choices)


@pytest.mark.parametrize(("shape", "dim"), [((3, 4), 2), ((3, 4), -3), ((), 0)])
def test_dimension_of_the_logsumexp(shape: tuple[int, ...], dim: int) -> None:
    expected = f"^dim is {dim}, must be a dimension of y, which has {len(shape)}"
    with pytest.raises(ValueError, match=expected):
        torch.ops.ghl_kernels.logsumexp(torch.randn(shape), 1.0, dim)


def test_tensor_of_the_logsumexp() -> None:
    with pytest.raises(ValueError, match=r"^y has shape \(3, 0\): no neurons along dimension 1"):
        torch.ops.ghl_kernels.logsumexp(torch.randn(3, 0), 1.0, 1)
    with pytest.raises(TypeError, match=r"^y has dtype torch.int64, must be one of float32"):
        torch.ops.ghl_kernels.logsumexp(torch.ones(3, 2, dtype=torch.int64), 1.0, 1)
    with pytest.raises(TypeError, match=r"^y has layout torch.sparse_coo"):
        torch.ops.ghl_kernels.logsumexp(torch.ones(3, 2).to_sparse(), 1.0, 1)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"g": torch.randn(1, 4, 3, 3)}, "y and g must have the same shape"),
        ({"stride": [1]}, "must be pairs"),
        ({"dilation": [0, 1]}, "too small"),
        ({"padding": [-1, 0]}, "too small"),
        ({"groups": 3}, "x and y do not match"),
        ({"x": torch.randn(2, 2, 3, 3)}, "the kernel reaches beyond x"),
        ({"G": torch.empty(4, 2, 3, 6)[..., ::2]}, "has gaps"),
        ({"H0": torch.empty(1, 2, 3, 3).expand(4, 2, 3, 3)}, "has gaps"),
        ({"totals": torch.empty(4)}, "has 4 elements, needs 5"),
        (
            {
                "y": torch.empty(2, 0, 3, 3),
                "g": torch.empty(2, 0, 3, 3),
                "G": torch.empty(0, 2, 3, 3),
                "H0": torch.empty(0, 2, 3, 3),
                "totals": torch.empty(1),
            },
            "x and y do not match",
        ),
    ],
)
def test_a_call_of_the_compiled_pair_that_would_read_or_write_elsewhere(
    changes: dict[str, object], reason: str
) -> None:
    """By whoever calls the library without the operators' checks."""
    found = library.serving("cpu")
    if not (found and found.loaded):
        pytest.skip("no native kernels")
    right = {
        "x": torch.randn(2, 2, 5, 5), "y": torch.randn(2, 4, 3, 3), "g": torch.randn(2, 4, 3, 3),
        "G": torch.empty(4, 2, 3, 3), "H0": torch.empty(4, 2, 3, 3), "totals": torch.empty(5),
        "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1, "competition": 0,
        "tau": 1.0, "channels_last": False,
    }  # fmt: skip
    torch.ops.ghl_kernels.pair.native(**right)
    with pytest.raises(RuntimeError, match=reason):
        torch.ops.ghl_kernels.pair.native(**(right | changes))


def test_calls_of_the_compiled_operators_without_neurons() -> None:
    found = library.serving("cpu")
    if not (found and found.loaded):
        pytest.skip("no native kernels")
    none, one = torch.empty(0, 3), torch.empty(1)
    with pytest.raises(RuntimeError, match="w has no neurons"):
        torch.ops.ghl_kernels.merge.native(
            none, none, one, none, none, torch.empty(3, 0), torch.empty(3), 0, 0, 0
        )
    with pytest.raises(RuntimeError, match="y has no neurons"):
        torch.ops.ghl_kernels.logsumexp.native(torch.empty(1, 0, 1, 1), one, 1.0)
