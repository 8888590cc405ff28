"""Two gloo ranks report what one process reports for the whole batch."""

import torch
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ghl.alignment import Monitor
from ghl.recipes.distributed import process_group
from ghl_kernels import Rule
from tests.alignment.oracle import assert_same_report


def network():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(12, 4)
    ).double()


def steps(model, x, accumulate, hebbian):
    """Reports of two steps under Adam, of a loss that is a mean over this rank's rows."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-2, weight_decay=0.1)
    monitor = Monitor(model, hebbian=hebbian)
    reports = []
    for _ in range(2):
        optimizer.zero_grad()
        for part in x.chunk(accumulate):
            (model(part).square().mean() / accumulate).backward()
        optimizer.step()
        reports.append({n.removeprefix("module."): found for n, found in monitor.report().items()})
    return reports


def given_steps(model, x, signals):
    """Reports of one step of a rule that has each rank add a signal of its own, per loss."""
    found = []
    for loss in ("mean", "sum"):
        monitor = Monitor(model, signal="given", statistic="batch", loss=loss)
        with torch.no_grad():
            model(x)
        for name, signal in signals.items():
            monitor.measure(name, signal)
        monitor.step()
        found.append(monitor.report())
        monitor.remove()
    return found


def signals_of(rank):
    generator = torch.Generator().manual_seed(rank)
    layers = {"0": (3, 2, 3, 3), "3": (4, 12)}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in layers.items()
    }


def rank_main(rank, file, x, results):
    torch.set_num_threads(1)
    with process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2):
        measure(rank, x, results)


def measure(rank, x, results):
    for index, (accumulate, hebbian) in enumerate(CASES):
        model = DistributedDataParallel(network())
        found = steps(model, x.chunk(2)[rank], accumulate, hebbian)
        torch.save(found, f"{results}/{rank}-{index}.pt")

    found = given_steps(network(), x.chunk(2)[rank], signals_of(rank))
    torch.save(found, f"{results}/{rank}-given.pt")

    model = network()  # rank 1 is in evaluation mode: the gap is told on both
    model.train(rank == 0)
    found = steps(model, x.chunk(2)[rank], 1, "hebb")
    torch.save(found, f"{results}/{rank}-gap.pt")


INSTAR = Rule(competition="softmax", decay="instar")
CASES = ((1, "hebb"), (2, "hebb"), (1, "ghl"), (2, INSTAR))


def test_two_ranks_are_one_batch(tmp_path):
    x = torch.randn(8, 2, 4, 4, dtype=torch.float64)
    whole = [steps(network(), x, 1, hebbian) for _, hebbian in CASES]
    mp.spawn(rank_main, (str(tmp_path / "store"), x, str(tmp_path)), nprocs=2)
    for index, expected in enumerate(whole):
        ranks = [torch.load(tmp_path / f"{rank}-{index}.pt") for rank in (0, 1)]
        for found in ranks:
            for one, other in zip(found, expected, strict=True):
                assert_same_report(one, other, rtol=1e-9, atol=1e-12)
    means = {n: (s + signals_of(1)[n]) / 2 for n, s in signals_of(0).items()}
    expected = given_steps(network(), x, means)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}-given.pt")
        for one, other in zip(found, expected, strict=True):
            assert_same_report(one, other, rtol=1e-9, atol=1e-12)
    for rank, words in ((0, "another rank"), (1, "evaluation mode")):
        for found in torch.load(tmp_path / f"{rank}-gap.pt")[-1].values():
            assert found["batch"] is None
            assert words in found["gaps"]["layer"]
