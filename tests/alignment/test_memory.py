"""What a Monitor keeps of a step: how many tensors of a weight's size, and that they suffice."""

import gc

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from ghl.alignment import Monitor


def held(model):
    """The dtypes of all tensors as large as the weight that Python knows of, its gradient too."""
    weight = model.weight
    found = {t.untyped_storage().data_ptr(): str(t.dtype) for t in (weight, weight.grad)}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.numel() == weight.numel():
            found[thing.untyped_storage().data_ptr()] = str(thing.dtype)
    return sorted(found.values())


def test_two_tensors_of_the_weights_size_on_measured_steps_and_none_between():
    """Beside weight and gradient: while gradients are there, and while the optimizer steps."""
    model = nn.Linear(41, 37)
    seen = []

    class Watched(torch.optim.SGD):
        def step(self):
            seen.append(held(model))
            super().step()

    optimizer = Watched(model.parameters(), 0.1, momentum=0.0)
    with Monitor(model, every=3) as monitor:
        for step in range(7):
            measured, waiting = monitor.measuring, ["torch.int8"] if step in (3, 6) else []
            optimizer.zero_grad()
            model(torch.randn(5, 41)).square().mean().backward()
            floats = ["torch.float32"] * (4 if measured else 2)
            assert held(model) == sorted(floats + waiting)
            optimizer.step()
            # the signs of a step that is not measured are taken for the next
            assert seen[-1] == sorted(floats + ["torch.int8"] * (step % 3 == 2))
    assert monitor.report()[""]["update"]["cosine"] != 0


def test_a_report_from_inside_an_optimizer_is_that_of_its_step():
    model = nn.Linear(4, 3)
    reports = []

    class Reporting(torch.optim.SGD):
        def step(self):
            reports.append(monitor.report()[""])
            super().step()

    optimizer = Reporting(model.parameters(), 0.1)
    with Monitor(model) as monitor:
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(5, 4)).square().mean().backward()
            before = monitor.report()[""]
            optimizer.step()
            assert reports[-1]["batch"]["cosine"] == before["batch"]["cosine"]


def test_no_activations_after_the_backward():
    """Though the loss, and with it the graph and its hooks, is kept to the end of the loop."""
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4))
    activations = []
    for layer in model:
        layer.register_forward_hook(
            lambda module, args, y: activations.append(StorageWeakRef(y.untyped_storage()))
        )
    with Monitor(model) as monitor:
        loss = model(torch.randn(5, 2, 3, 3)).square().mean()
        assert not all(memory.expired() for memory in activations)
        loss.backward()
        assert all(memory.expired() for memory in activations)
        assert monitor.report()["0"]["batch"]
