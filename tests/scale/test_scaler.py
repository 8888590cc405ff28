"""GradScaler in one process: scales and overflows reach G, never an update."""

import pytest
import torch
from torch import nn

import ghl

from .nets import STEPS, alone, backward, batch, loss_of, make, sgd, synchronized, train
from .world import assert_close


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(fused, unscale):
    """The weights of a run without one, though a fused optimizer divides by the scale itself."""
    model, optimizer, _ = synchronized(fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    if unscale:
        step = scaler.step

        def unscale_and_step(optimizer):
            scaler.unscale_(optimizer)
            return step(optimizer)

        scaler.step = unscale_and_step
    assert_close(train(model, optimizer, scaler=scaler), alone("conv"), 1e-10)


@pytest.mark.parametrize("fused", [False, True])
def test_overflow_skips_the_step(fused):
    """An infinite gradient moves nothing, and what was held with it is gone."""
    model, optimizer, _ = synchronized(fused=fused, momentum=0.0)
    expected = train(*synchronized(momentum=0.0)[:2])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = [p.detach().clone() for p in model.parameters()]
    backward(model, "conv", 7, scaler=scaler)
    model.second[0].weight.grad[0, 0, 0, 0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert_close(list(model.parameters()), before, 1e-300)
    optimizer.zero_grad()
    assert_close(train(model, optimizer, scaler=scaler), expected, 1e-10)


def test_fp16_with_and_without_a_scaler():
    """Under fp16 autocast a scale changes the gradients that are not zero for it by a rounding."""
    weights = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**4)):
        model = make("conv", ghl.Rule(gate="hebb"), torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), 0.02)
        ghl.synchronize(model, optimizer)
        for step in range(STEPS):
            x, target = batch("conv", step, torch.float32)
            for piece, wanted in zip(x.chunk(2), target.chunk(2), strict=True):
                with torch.autocast("cpu", torch.float16):
                    y = model(piece)
                loss = loss_of(y, wanted)
                (scaler.scale(loss) if scaler else loss).backward()
            scaler.step(optimizer) if scaler else optimizer.step()
            if scaler:
                scaler.update()
            optimizer.zero_grad()
        weights.append(list(model.parameters()))
    assert_close(weights[0], weights[1], 2e-3)


def test_grad_scaler_without_synchronize_is_an_error():
    """Nothing but G may be divided by the scale of the loss; ordinary models are not touched."""
    for fused in (False, True):
        model = make("conv")
        optimizer = sgd(model, fused=fused)
        scaler = torch.amp.GradScaler("cpu")
        backward(model, "conv", 0, micro=1, scaler=scaler)
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(RuntimeError, match=r"GradScaler.*ghl.synchronize\(model, optimizer\)"):
            scaler.step(optimizer)
        assert_close(list(model.parameters()), before, 1e-300)
        plain = nn.Linear(3, 3)
        optimizer = sgd(plain, fused=fused)
        scaler.scale(plain(torch.ones(1, 3)).sum()).backward()
        scaler.step(optimizer)
        assert plain.weight.grad.eq(1).all() or fused
