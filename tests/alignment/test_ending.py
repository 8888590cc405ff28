"""The end of a step for many weights: how few operations and messages it takes, what it leaves."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ghl.alignment import Monitor, ending
from ghl.recipes.distributed import process_group


class Counted(TorchDispatchMode):
    """Counts the operations inside."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def network(layers):
    model = nn.Sequential(*[nn.Linear(5, 5, bias=False) for _ in range(layers)])
    for layer in model:
        nn.init.orthogonal_(layer.weight)  # gradients of the first as large as of the last
    return model


def operations(layers, **options):
    """Of the optimizer's step and of the report in the second of two steps."""
    model = network(layers)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, foreach=True)
    with Monitor(model, **options) as monitor:
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(3, 5)).square().mean().backward()
            with Counted() as step:
                optimizer.step()
            with Counted() as report:
                assert all(found["update"] for found in monitor.report().values())
    return step.count, report.count


@pytest.mark.parametrize("hebbian", ["hebb", "oja"])
@pytest.mark.parametrize("statistic", ["batch", "both"])
def test_operations_do_not_grow_with_layers(statistic, hebbian):
    """But for three of a step, which the sign flips take, and few of a report."""
    few, many = (operations(n, statistic=statistic, hebbian=hebbian) for n in (4, 24))
    assert many[0] - few[0] <= 20 * (3 if statistic == "batch" else 4)
    assert many[1] - few[1] <= 20 * 10


def test_one_rank_sends_two_messages_and_keeps_none_of_weights(tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr(
        dist, "all_reduce", lambda t, **options: messages.append(t.numel()) or Done()
    )
    model = network(12)
    with (
        process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1),
        Monitor(model) as monitor,
    ):
        model(torch.randn(3, 5)).square().mean().backward()
        ending.close(monitor._tracks, 1, distributed=True)
        ending.after(monitor._tracks)
        for track in monitor._tracks:
            kept = [t for part in track.last.parts.values() for t in (part.neurons, part.layer)]
            for t in (*kept, *track.last.scalars()):
                assert t.untyped_storage().nbytes() <= 4 * messages[0], "a view of weights' sums"
    assert len(messages) == 2
    assert messages[1] == 12 * 2 * 25


class Done:
    def wait(self):
        pass


def test_a_weight_kept_for_a_step_that_raised_is_not_compared_later():
    model = network(1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Monitor(model) as monitor:
        model(torch.randn(3, 5)).square().mean().backward()
        optimizer.param_groups[0]["lr"] = None
        with pytest.raises(TypeError):
            optimizer.step()
        optimizer.zero_grad()
        model(torch.randn(3, 5)).square().mean().backward()
        monitor.step()
        found = monitor.report()["0"]
    assert found["update"] is None
    assert found["gaps"]["update"] == "no optimizer has made a step with it"
