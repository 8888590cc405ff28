"""Which implementation runs, why, and what happens when a compiled library is not there."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import Conv, Linear

import ghl_kernels
from ghl_kernels import Backend, Problem, Rule, dispatch, library, native
from ghl_kernels.library import Library
from ghl_kernels.ops import OPERATORS
from ghl_kernels.tuning import tiles, trial

LINEAR = Linear(4, 3, 5)


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> str:
    """A process in which nothing was compiled; the reason it knows."""
    reason = "not built: a test says so"
    monkeypatch.setattr(library, "_serving", {"cpu": Library(Path("absent.so"), reason)})
    return reason


@pytest.fixture
def some_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process in which the CPU library is loaded, as far as the dispatcher knows."""
    monkeypatch.setattr(library, "_serving", {"cpu": Library(Path("present.so"), None)})


@pytest.mark.parametrize("operator", OPERATORS)
def test_native_runs_where_the_library_is_loaded(operator: str, some_library: None) -> None:
    backend = ghl_kernels.backend(operator, torch.zeros(2, 2), problem())
    assert backend == Backend("native", "compiled kernels for cpu are loaded")


@pytest.mark.parametrize("operator", OPERATORS)
def test_composed_runs_where_it_is_not_and_says_why(operator: str, no_library: str) -> None:
    backend = ghl_kernels.backend(operator, torch.zeros(2, 2), problem())
    assert backend == Backend("composed", no_library)


def test_composed_serves_devices_without_kernels(some_library: None) -> None:
    backend = ghl_kernels.backend("merge", torch.zeros(2, 2, device="meta"))
    assert backend == Backend("composed", "there are no native kernels for meta")


def test_everything_works_with_nothing_compiled(no_library: str) -> None:
    tensors = LINEAR.tensors()
    exact = LINEAR.reference([t.double() for t in tensors], "ghl")
    torch.testing.assert_close(LINEAR.update(tensors, Rule())[0].double(), exact.update)
    assert ghl_kernels.last("linear_update") == Backend("composed", no_library)


def problem(groups: int = 1, neurons: int = 64) -> Problem:
    return Problem(1000, neurons, 16, torch.float16, (3, 3), groups=groups)


def test_groups_of_few_neurons_are_composed_on_a_cpu(some_library: None) -> None:
    """The native kernels' tiles are neurons of one group; one group is never too few."""

    def name(groups: int, neurons: int) -> str:
        return ghl_kernels.backend("conv2d_pair", torch.zeros(1), problem(groups, neurons)).name

    fewest = native.FEWEST_GROUP_NEURONS
    assert name(1, 1) == name(2, fewest) == "native"
    assert name(2, fewest - 1) == "composed"


def test_unknown_operators_are_refused() -> None:
    with pytest.raises(ValueError, match=r"operator is 'merg', .*did you mean 'merge'"):
        ghl_kernels.last("merg")


def test_few_rows_are_composed_on_a_cpu(some_library: None) -> None:
    """Of a linear layer, where its products have the precision of ours; merges have no rows."""

    def name(rows: int, dtype: torch.dtype, linear: bool = True) -> str:
        few = dataclasses.replace(problem(), rows=rows, dtype=dtype, linear=linear)
        return ghl_kernels.backend("linear_pair", torch.zeros(1), few).name

    fewest = native.FEWEST_ROWS
    assert name(fewest, torch.float32) == name(1, torch.bfloat16) == "native"
    assert name(1, torch.float32, linear=False) == "native"
    assert name(fewest - 1, torch.float32) == name(1, torch.float64) == "composed"
    assert ghl_kernels.backend("merge", torch.zeros(1)).name == "native"


def test_a_problem_is_read_from_the_tensors_of_a_layer() -> None:
    x, y, g, w = Conv(2, 6, (7, 5), 15, (3, 2), (2, 1), (0, 1), groups=3).tensors()
    of_conv = Problem.of_conv2d(x, y, g, w, (2, 1), (0, 1), (1, 1), 3)
    wanted = Problem(
        2 * 3 * 6, 5, 2, torch.float32, (3, 2), (2, 1), padding=(0, 1), groups=3, image=6 * 7 * 5
    )
    assert dataclasses.astuple(of_conv) == dataclasses.astuple(wanted)
    assert (of_conv.columns, of_conv.all_neurons, of_conv.depthwise) == (12, 15, False)
    x, _, _, w = LINEAR.tensors()
    assert Problem.of_linear(x, w) == Problem(4, 5, 3, torch.float32, linear=True)
    assert Problem.of_linear(x, w).pointwise


BY_TRITON = pytest.mark.parametrize("name", dispatch.BY_TRITON)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process whose Triton compiles, and does not interpret."""
    pytest.importorskip("triton")
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)


@BY_TRITON
def test_forcing_triton_on_a_cpu_is_an_error_unless_it_interprets(
    name: str, compiled: None
) -> None:
    wanted = f"{name} is forced for linear_pair, but Triton does not compile for cpu"
    with ghl_kernels.force(name), pytest.raises(RuntimeError, match=wanted):
        LINEAR.pair(LINEAR.tensors(), Rule())


@BY_TRITON
def test_forcing_triton_where_it_is_not_is_an_error(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "triton_missing", lambda: "Triton cannot be imported: a test")
    with ghl_kernels.force(name), pytest.raises(RuntimeError, match=r"merge, but .*imported: a te"):
        ghl_kernels.backend("merge", torch.zeros(1))


def test_a_cpu_never_takes_triton_unless_forced(some_library: None) -> None:
    """Also where it interprets: that is for tests."""
    assert ghl_kernels.backend("conv2d_pair", torch.zeros(1), problem()).name == "native"


def on_gpu(dtype: torch.dtype = torch.float16) -> SimpleNamespace:
    """What the dispatcher sees of a tensor on a GPU."""
    return SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype)


@pytest.fixture
def hopper(compiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has warned of nothing, with a GPU of capability 9.0 whose trials succeed."""
    from ghl_kernels.tuning import tiles, trial

    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(trial, "failure", lambda *arguments: None)
    monkeypatch.setattr(trial, "failure_of_sums", lambda *arguments: None)
    monkeypatch.setattr(library, "_serving", {})  # of CUDA: tests/cuda/test_choice.py
    table = tiles.Table.read(tiles.SHIPPED / "sm90.json")
    monkeypatch.setattr(tiles, "table", lambda device: table)
    monkeypatch.setattr(tiles, "nearest", tiles.nearest.__wrapped__)


def assert_composed_and_said_once(first: SimpleNamespace, of: Problem | None, reason: str) -> None:
    with pytest.warns(UserWarning, match=f"composes PyTorch's operators: .*{reason}"):
        backend = ghl_kernels.backend("conv2d_pair", first, of)
    assert backend.name == "composed"
    assert reason in backend.reason
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ghl_kernels.backend("conv2d_pair", first, of) == backend
    with ghl_kernels.force("triton"), pytest.raises(RuntimeError, match=reason):
        ghl_kernels.backend("conv2d_pair", first, of)


def test_an_old_gpu_is_composed_and_said_once(
    hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert_composed_and_said_once(on_gpu(), problem(), "compute capability 7.5")


def test_float64_is_composed_and_said_once(hopper: None) -> None:
    assert_composed_and_said_once(on_gpu(torch.float64), problem(), "no float64")


@pytest.mark.parametrize("sizes", [{"rows": 2**31}, {"channels": 2**26}, {"image": 2**31}])
def test_sizes_beyond_32_bits_are_composed_and_said_once(
    sizes: dict[str, int], hopper: None
) -> None:
    """Rows, weights and the numbers of one image are counted in 32 bits by the kernels."""
    too_large = dataclasses.replace(problem(), **sizes)
    assert_composed_and_said_once(on_gpu(), too_large, "rows, weights or the numbers of one image")


def test_a_failed_trial_is_composed_and_said_once(
    hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "failure", lambda *arguments: "a trial raised")
    with pytest.warns(UserWarning, match="composes PyTorch's operators: a trial raised"):
        backend = ghl_kernels.backend("conv2d_pair", on_gpu(), problem())
    assert backend == Backend("composed", "a trial raised")
    monkeypatch.setattr(trial, "failure_of_sums", lambda *arguments: "a merge did")
    with pytest.warns(UserWarning, match="composes PyTorch's operators: a merge did"):
        assert ghl_kernels.backend("merge", on_gpu()) == Backend("composed", "a merge did")


def test_a_layer_for_which_a_table_has_nothing_that_runs_here_is_composed(
    hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tuned where Triton was missing, and used where the compiled library is."""
    shipped = tiles.table(on_gpu().device)
    entries = tuple(e for e in shipped.entries if e.strategy in tiles.BY_CUDA)
    tuned = dataclasses.replace(shipped, name="tuned", entries=entries)
    monkeypatch.setattr(tiles, "table", lambda device: tuned)
    with pytest.warns(UserWarning, match="composes PyTorch's operators: table tuned has no entry"):
        backend = ghl_kernels.backend("conv2d_pair", on_gpu(), problem())
    assert backend == Backend("composed", "table tuned has no entry that runs here")


def test_a_gpu_takes_the_strategy_of_the_nearest_entry_and_says_which(hopper: None) -> None:
    first = Problem(12544, 512, 512, torch.float16, (3, 3), padding=(1, 1))
    backend = ghl_kernels.backend("conv2d_pair", on_gpu(), first)
    assert backend.name == "library"
    measured = "table sm90 (measured on NVIDIA H200)"
    assert f"{measured}: conv, 12544 rows, 512 neurons of 4608" in backend.reason
    second = Problem(802816, 64, 256, torch.float16, copied_bytes=5_000_000)
    backend = ghl_kernels.backend("conv2d_pair", on_gpu(), second)
    assert backend.name == "triton"
    assert "5.0 MB moved first to bring activations into channels_last" in backend.reason
    assert ghl_kernels.backend("merge", on_gpu()).name == "triton"


def test_a_choice_is_made_once_but_not_where_it_may_change(
    hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other layouts are other calls; a graph's capture and a lack of memory settle nothing."""
    made, capturing = [], False
    backend = Backend("triton", "why")

    def choose(*arguments: object) -> Backend:
        made.append(arguments)
        return backend

    monkeypatch.setattr(dispatch, "choose", choose)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)

    def calls(of: Problem) -> int:
        before = len(made)
        for _ in range(2):
            dispatch.settled("conv2d_pair", on_gpu(), of)
        return len(made) - before

    assert [calls(problem()), calls(problem())] == [1, 0]
    assert calls(dataclasses.replace(problem(), copied_bytes=8)) == 1
    dispatch.unsettle()
    capturing = True
    assert calls(problem()) == 2
    capturing, backend = False, Backend("cuda", trial.Passing("a trial found no memory"))
    assert [calls(problem()), calls(problem())] == [2, 2]


def test_a_failure_that_passes_is_told_though_another_came_first() -> None:
    passing = trial.Passing("a trial found no memory")
    assert dispatch.why(["wrong", passing, "worse"]) == passing
    assert dispatch.why(["wrong", "worse"]) == "wrong"


def test_float32_takes_tensor_cores_only_where_tf32_is_allowed(hopper: None) -> None:
    """By the switch of convolutions; the library's products follow it by themselves."""
    conv, before = torch.backends.cudnn.conv, torch.backends.cudnn.conv.fp32_precision
    first = dataclasses.replace(problem(), dtype=torch.float32)
    try:
        conv.fp32_precision = "ieee"
        backend = ghl_kernels.backend("conv2d_pair", on_gpu(torch.float32), first)
        assert backend == Backend("library", "float32 without TF32 has no tensor-core product")
        conv.fp32_precision = "tf32"
        assert "nearest" in ghl_kernels.backend("conv2d_pair", on_gpu(torch.float32), first).reason
    finally:
        conv.fp32_precision = before


def test_forcing_what_is_not_there_is_an_error(no_library: str) -> None:
    with (
        ghl_kernels.force("native"),
        pytest.raises(RuntimeError, match=f"native is forced for linear_pair, but {no_library}"),
    ):
        LINEAR.pair(LINEAR.tensors(), Rule())


def test_unknown_names_are_errors() -> None:
    with (
        pytest.raises(ValueError, match=r"name is 'nativ', .*did you mean 'native'"),
        ghl_kernels.force("nativ"),
    ):
        pass
    with pytest.raises(ValueError, match=r"operator is 'conv2d', must be one of logsumexp"):
        ghl_kernels.backend("conv2d", torch.zeros(1))
    with pytest.raises(ValueError, match="problem is None, must be the sizes of the layer"):
        ghl_kernels.backend("conv2d_pair", torch.zeros(1))


def test_force_nests_and_ends_with_an_exception(some_library: None) -> None:
    def name() -> str:
        return ghl_kernels.backend("merge", torch.zeros(1)).name

    with ghl_kernels.force("composed"):
        assert ghl_kernels.backend("merge", torch.zeros(1)) == Backend("composed", "forced")
        with ghl_kernels.force("native"):
            assert name() == "native"
        assert name() == "composed"
    with pytest.raises(ZeroDivisionError), ghl_kernels.force("composed"):
        raise ZeroDivisionError
    assert name() == "native"


def test_force_holds_on_the_threads_of_autograd(no_library: str) -> None:
    """backward() runs on threads of its own: a choice kept per thread would not reach them."""
    names = []

    def choose() -> None:
        names.append(ghl_kernels.backend("merge", torch.zeros(1)))

    with ghl_kernels.force("composed"):
        thread = threading.Thread(target=choose)
        thread.start()
        thread.join()
    assert names == [Backend("composed", "forced")]


def test_last_is_what_ran_and_none_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_last", {})
    assert ghl_kernels.last("logsumexp") is None
    with ghl_kernels.force("composed"):
        torch.ops.ghl_kernels.logsumexp(torch.zeros(2, 2), 1.0, 1)
    assert ghl_kernels.last("logsumexp") == Backend("composed", "forced")
    assert ghl_kernels.last("merge") is None


def test_both_implementations_agree(implementation: str) -> None:
    """And the one that is forced is the one whose functions are called."""
    layer = Conv(2, 4, (5, 5), 9, padding=(1, 1))
    tensors = layer.tensors()
    forced = layer.update(tensors, Rule())[0]
    with ghl_kernels.force("composed"):
        torch.testing.assert_close(forced, layer.update(tensors, Rule())[0], rtol=1e-4, atol=1e-5)
    layer.update(tensors, Rule())


def test_an_absent_library_is_a_reason_not_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(library, "DIRECTORY", tmp_path)
    loaded = library.load("ghl_kernels_cpu")
    assert not loaded.loaded
    assert loaded.path == tmp_path / "libghl_kernels_cpu.so"
    assert loaded.reason.startswith("not built")


def test_a_damaged_library_is_a_reason_not_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(library, "DIRECTORY", tmp_path)
    (tmp_path / "libghl_kernels_cpu.so").write_bytes(b"not a library")
    loaded = library.load("ghl_kernels_cpu")
    assert not loaded.loaded
    assert f"does not load into torch {torch.__version__}" in loaded.reason
    assert "\n" not in loaded.reason


def test_the_package_imports_and_learns_with_no_library_beside_it(tmp_path: Path) -> None:
    """A copy of the Python files alone, in a process of its own."""
    source = Path(ghl_kernels.__file__).parent
    package = tmp_path / "ghl_kernels"
    package.mkdir()
    for file in source.glob("*.py"):
        (package / file.name).write_bytes(file.read_bytes())
    program = (
        "import torch, ghl_kernels as k\n"
        "x, y, w = torch.randn(6, 3), torch.randn(6, 4), torch.randn(4, 3)\n"
        "rule = ('softmax', 1.0, 'oja', 'sign', 'absmax')\n"
        "update = torch.ops.ghl_kernels.linear_update(x, y, y, w, *rule)[0]\n"
        "wanted = k.reference.linear_update(x, y, y, w).update\n"
        "torch.testing.assert_close(update, wanted)\n"
        "print(k.__file__, k.last('linear_update'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert str(package) in done.stdout
    assert "name='composed', reason='not built" in done.stdout
