"""When the compiled kernels are taken, and what is told where they are not: by made-up GPUs."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ghl_kernels
from ghl_kernels import Backend, Problem, dispatch, library
from ghl_kernels.cuda import kernels
from ghl_kernels.library import Library
from ghl_kernels.tuning import tiles, trial
from ghl_kernels.tuning.tiles import Entry, Table, Tile

GPU = torch.device("cuda", 0)
HALF = torch.float16
LAYER = Problem(4096, 64, 64, HALF, linear=True)
SMALL = Tile(32, 64, 64, 4, 4, 3, packed=True)
LARGE = Tile(32, 128, 128, 8, 3, 1, packed=True)
WHOLE = Tile(32, 256, 64, 8, 3, 1, packed=True)
BY_TRITON = Entry("pointwise", 16, 4096, 64, 64, "triton", Tile(64, 64, 64, 4, 3))


def on_gpu(dtype: torch.dtype = HALF) -> SimpleNamespace:
    """What the dispatcher sees of a tensor on a GPU."""
    return SimpleNamespace(device=GPU, dtype=dtype)


@dataclasses.dataclass
class Machine:
    """A GPU, a CUDA library and a table, and what trials of modules say."""

    monkeypatch: pytest.MonkeyPatch
    failing: dict[str, str] = dataclasses.field(default_factory=dict)

    def capability(self, major: int, minor: int) -> None:
        self.monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))

    def architectures(self, *compiled: str) -> None:
        self.monkeypatch.setattr(library, "architectures", lambda library: compiled)

    def table(self, *entries: Entry, measured: bool = True, merges: str | None = None) -> None:
        origin = {"gpu": "made up"} if measured else None
        table = Table("made-up", origin, entries, merges)
        self.monkeypatch.setattr(tiles, "table", lambda device: table)

    def without_triton(self) -> None:
        self.monkeypatch.setattr(dispatch, "triton_missing", lambda: "Triton cannot be imported")

    def failure(self, module: str) -> str | None:
        return self.failing.get(module)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Compute capability 9.0, the default architectures, and Triton's entry alone."""
    machine = Machine(monkeypatch)
    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.setattr(library, "_serving", {"cuda": Library(Path("some.so"), None)})
    monkeypatch.setattr(dispatch, "triton_missing", lambda: None)
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    monkeypatch.setattr(tiles, "nearest", tiles.nearest.__wrapped__)
    monkeypatch.setattr(kernels, "remembered", kernels.remembered.__wrapped__)
    monkeypatch.setattr(trial, "failure", lambda *of: machine.failure(of[3]))
    monkeypatch.setattr(trial, "failure_of_sums", lambda d, module, name: machine.failure(module))
    known = (0, SMALL), (1, LARGE), (2, WHOLE)
    monkeypatch.setattr(
        kernels, "compiled_tiles", lambda *of: known[:1] if "sm90" in of[0] else known
    )
    machine.capability(9, 0)
    machine.architectures("8.0", "9.0a", "10.0+PTX")
    machine.table(BY_TRITON, measured=False)
    return machine


def choice(operator: str = "linear_pair", problem: Problem | None = LAYER) -> Backend:
    return ghl_kernels.backend(operator, on_gpu(), problem)


def entry(strategy: str, tile: Tile = SMALL) -> Entry:
    return dataclasses.replace(BY_TRITON, strategy=strategy, tile=tile)


def test_without_a_measurement_a_layer_is_tritons(machine: Machine) -> None:
    assert choice().name == "triton"
    machine.table(BY_TRITON, entry("cuda"), entry("cuda_sm90"), measured=False)
    assert choice().name == "triton"


@pytest.mark.parametrize("name", tiles.BY_CUDA)
def test_a_measured_entry_is_taken(name: str, machine: Machine) -> None:
    machine.table(entry(name), BY_TRITON)
    backend = choice()
    assert backend.name == name
    assert "nearest in table made-up (measured on made up)" in backend.reason


def test_without_triton_a_layer_is_compiled_kernels(machine: Machine) -> None:
    machine.without_triton()
    assert choice() == Backend("cuda", "compiled kernels, their tile by a rule of thumb")


def test_without_triton_nothing_has_a_u_that_it_writes(machine: Machine) -> None:
    machine.table(entry("cuda_sm90_stored"), entry("cuda_sm90"))
    assert choice().name == "cuda_sm90_stored"
    machine.without_triton()
    assert choice().name == "cuda_sm90"
    assert "Triton cannot be imported" in forced_error("cuda_sm90_stored")


def test_a_failed_trial_of_triton_is_told_once_and_compiled_kernels_taken(
    machine: Machine,
) -> None:
    machine.failing = {"ghl_kernels.triton.fused": "a trial of Triton raised"}
    with pytest.warns(UserWarning, match="takes cuda: a trial of Triton raised"):
        assert choice() == Backend("cuda", "a trial of Triton raised")
    assert choice().name == "cuda"


def test_what_fails_everywhere_is_composed(machine: Machine) -> None:
    machine.failing = {"ghl_kernels.triton.fused": "no", "ghl_kernels.cuda.fused": "nor"}
    with pytest.warns(UserWarning, match="composes PyTorch's operators: no"):
        assert choice() == Backend("composed", "no")


def test_hoppers_kernels_are_never_taken_unmeasured(machine: Machine) -> None:
    """Triton's and the library's are faster for about half of the layers that were measured."""
    machine.without_triton()
    machine.table()
    assert choice().name == "cuda"
    machine.failing = {"ghl_kernels.cuda.fused": "a trial of cuda raised"}
    with pytest.warns(UserWarning, match="composes"):
        assert choice().name == "composed"


def test_float32_without_tf32(machine: Machine, exact_float32: None) -> None:
    """Three products in TF32 where there is no library's float32 product with a stored u."""
    layer = dataclasses.replace(LAYER, dtype=torch.float32)
    machine.table(dataclasses.replace(BY_TRITON, bits=32), measured=False)
    assert choice(problem=layer).name == "library"
    machine.without_triton()
    assert choice(problem=layer).name == "cuda"


@pytest.mark.parametrize("allowed", [True, False])
@pytest.mark.parametrize("linear", [True, False])
def test_products_with_patches_obey_the_flag_of_matrix_products(
    linear: bool, allowed: bool, machine: Machine, exact_float32: None
) -> None:
    """They are cuBLAS's, of a convolution too: without that flag they would be no TF32."""
    layer = dataclasses.replace(LAYER, dtype=torch.float32, linear=linear)
    by_triton = dataclasses.replace(BY_TRITON, bits=32)
    machine.table(dataclasses.replace(by_triton, strategy="library_patches"), by_triton)
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    torch.backends.cuda.matmul.fp32_precision = "tf32" if allowed else "ieee"
    without = "library" if linear else "triton"
    assert choice(problem=layer).name == ("library_patches" if allowed else without)
    for other in ({"dtype": HALF}, {"groups": 2}):
        assert choice(problem=dataclasses.replace(layer, **other)).name != "library_patches"
    machine.without_triton()
    assert choice(problem=layer).name == "cuda"


def test_merges_need_no_compiler_unless_one_was_measured_faster(machine: Machine) -> None:
    assert choice("foreach_merge", None).name == "cuda"
    machine.table(BY_TRITON, merges="triton")
    assert choice("merge", None) == Backend("triton", "the fastest that was measured")
    machine.failing = {"ghl_kernels.triton.fused": "a trial raised"}
    with pytest.warns(UserWarning, match="takes cuda"):
        assert choice("merge", None).name == "cuda"


def forced_error(name: str, problem: Problem | None = LAYER, dtype: torch.dtype = HALF) -> str:
    with ghl_kernels.force(name), pytest.raises(RuntimeError) as raised:
        ghl_kernels.backend("linear_pair", on_gpu(dtype), problem)
    return str(raised.value)


def test_no_compiled_architecture_fits(machine: Machine) -> None:
    machine.architectures("9.0a")
    machine.capability(8, 6)
    assert choice().name == "triton"
    assert "compiled for 9.0a, none of which runs on a GPU of compute capability 8.6: build it" in (
        forced_error("cuda")
    )


def test_a_library_that_is_not_loaded(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_serving", {"cuda": Library(Path("x.so"), "not built: why")})
    assert choice().name == "triton"
    assert "the CUDA library: not built: why" in forced_error("cuda")
    machine.without_triton()
    with pytest.warns(UserWarning, match="Triton cannot be imported; the CUDA library: not bui"):
        assert choice().name == "composed"


@pytest.mark.parametrize(
    ("name", "capability", "problem", "dtype", "reason"),
    [
        ("cuda", (7, 5), LAYER, HALF, "compute capability 7.5, the kernels need 8.0"),
        ("cuda", (9, 0), LAYER, torch.float64, "have no float64"),
        ("cuda", (9, 0), dataclasses.replace(LAYER, rows=2**31), HALF, "are more than 2**31"),
        ("cuda_sm90", (10, 0), LAYER, HALF, "compute capability 10.0, not 9.0"),
        (
            "cuda_sm90",
            (9, 0),
            dataclasses.replace(LAYER, dtype=torch.float32),
            torch.float32,
            "16-bit numbers, not torch.float32",
        ),
        (
            "cuda_sm90",
            (9, 0),
            dataclasses.replace(LAYER, groups=2, channels=12),
            HALF,
            "multiples of 8, not of 12 channels",
        ),
    ],
)
def test_what_the_kernels_cannot_do(
    name: str,
    capability: tuple[int, int],
    problem: Problem | None,
    dtype: torch.dtype,
    reason: str,
    machine: Machine,
) -> None:
    machine.capability(*capability)
    assert reason in forced_error(name, problem, dtype)


@pytest.mark.parametrize("name", tiles.BY_SM90)
def test_hoppers_kernels_have_to_be_compiled(name: str, machine: Machine) -> None:
    machine.architectures("8.0", "9.0+PTX")
    assert "compiled for 8.0 9.0+PTX, without 9.0a" in forced_error(name)


def test_a_cpu_has_none() -> None:
    with ghl_kernels.force("cuda"), pytest.raises(RuntimeError, match=r"do not run on cpu|is not"):
        ghl_kernels.backend("merge", torch.zeros(1))


def test_the_tile_of_a_measured_entry_that_is_still_compiled(machine: Machine) -> None:
    measured = entry("cuda", dataclasses.replace(LARGE, programs=2))
    machine.table(measured)
    assert kernels.choose("cuda", LAYER, GPU).tile == measured.tile
    assert kernels.number_of(measured.tile, "cuda", LAYER) == 1
    machine.table(entry("cuda", Tile(48, 96, 96, 4, 2, packed=True)))
    assert kernels.choose("cuda", LAYER, GPU).tile == SMALL


@pytest.mark.parametrize(
    ("neurons", "columns", "tile"),
    [
        (64, 512, SMALL),
        (10, 9, SMALL),
        (100, 100, LARGE),
        (512, 512, LARGE),
        (256, 512, WHOLE),
        (200, 64, WHOLE),
    ],
)
def test_the_rule_of_thumb(neurons: int, columns: int, tile: Tile, machine: Machine) -> None:
    """Whole rows of y in a tile save their statistics; a tile must not be mostly empty."""
    machine.table()
    layer = dataclasses.replace(LAYER, neurons=neurons, channels=columns)
    assert kernels.choose("cuda", layer, GPU).tile == tile


@pytest.mark.parametrize(("dilation", "tile"), [((1, 1), LARGE), ((1, 2), SMALL)])
def test_the_tile_of_few_channels_is_one_for_the_folded_layer(
    dilation: tuple[int, int], tile: Tile, machine: Machine
) -> None:
    """Of 96 columns instead of 27; its entry has the layer's own sizes, so that it is found."""
    layer = Problem(4096, 128, 3, HALF, (3, 3), padding=(1, 1), dilation=dilation)
    machine.table()
    chosen = kernels.choose("cuda", layer, GPU)
    assert (chosen.kind, chosen.columns, chosen.tile) == ("packed", 27, tile)
    assert (LARGE in kernels.candidates("cuda", layer)) is (tile == LARGE)
    measured = dataclasses.replace(chosen, tile=SMALL)
    machine.table(measured)
    assert kernels.choose("cuda", layer, GPU) == measured


def test_nothing_compiled_for_a_layer(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "compiled_tiles", lambda *of: ())
    with pytest.raises(RuntimeError, match=r"has no tile of cuda for torch\.float16"):
        kernels.choose("cuda", LAYER, GPU)


def test_a_tuner_tries_what_suits_a_layer_and_more_splits(machine: Machine) -> None:
    tried = kernels.candidates("cuda", LAYER)
    assert tried == [SMALL, dataclasses.replace(SMALL, programs=6)]
    large = dataclasses.replace(LAYER, neurons=512)
    assert {tile.block_k for tile in kernels.candidates("cuda", large)} == {64, 256}


def test_boxes_are_those_of_the_kernel() -> None:
    """Splits count them in Python."""
    header = Path(__file__).parents[2] / "csrc" / "cuda" / "sm90_layout.h"
    assert f"kBox = {kernels.BOX};" in header.read_text()
    eights = re.search(r"kEights = (\d+);", header.with_name("sm90_exchange.h").read_text())
    assert eights and int(eights[1]) * 8 * 32 == kernels.MOST_EXCHANGED


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"neurons": 1024}, None),
        ({"neurons": 1032}, "up to 1024, not of 1 of 1032"),
        ({"neurons": 36}, "a multiple of 8 neurons"),
        ({"groups": 2}, "one group"),
        ({"competition": "hard"}, "a softmax, not hard"),
        ({"sum_u": True}, "has no sums, which are asked for"),
        ({"neurons": 1024, "channels": 4096}, "more than the GPU runs at once"),
        ({"dtype": torch.float32}, "of 16-bit numbers"),
    ],
)
def test_layers_whose_u_can_be_exchanged(
    change: dict[str, object], reason: str | None, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    tile = Tile(64, 64, 128, 20, 6, packed=True, box=64, resident=True)
    monkeypatch.setattr(kernels, "compiled_tiles", lambda *of: ((5, tile),))
    monkeypatch.setattr(kernels, "most_programs", lambda: 132)
    found = kernels.sm90_unfit(kernels.EXCHANGED, dataclasses.replace(LAYER, **change))
    assert (found is None) if reason is None else reason in (found or "")


@pytest.mark.parametrize("neurons", [128, 136, 192, 256, 320])
def test_by_rule_blocks_of_a_cluster_have_neurons(neurons: int) -> None:
    one = Tile(64, 64, 256, 12, 4, packed=True, box=64)
    two = dataclasses.replace(one, block_k=128, cluster=2)
    layer = dataclasses.replace(LAYER, neurons=neurons, channels=256)
    chosen = kernels.by_rule(layer, ((0, one), (1, two)))
    assert chosen.cluster == (2 if neurons % 128 == 0 else 1)
