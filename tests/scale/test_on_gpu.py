"""What only a GPU shows of training at scale: NCCL, fp16 with a scaler, CUDA graphs, nvJPEG."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

import ghl

from .nets import batch, loss_of, make, sgd

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
STEPS, FLOAT = 5, torch.float32
Forward = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def always_exact_float32(exact_float32: None) -> Iterator[None]:
    """And one algorithm for each product: signs of G follow its last bits."""
    before, torch.backends.cudnn.deterministic = torch.backends.cudnn.deterministic, True
    yield
    torch.backends.cudnn.deterministic = before


@pytest.fixture
def nccl(tmp_path) -> Iterator[None]:
    options = {"rank": 0, "world_size": 1, "device_id": torch.device("cuda", 0)}
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", **options)
    yield
    dist.destroy_process_group()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, forward: Forward) -> list[Tensor]:
    """The parameters after a few steps on images."""
    for step in range(STEPS):
        x, target = (t.cuda() for t in batch("conv", step, FLOAT))
        optimizer.zero_grad()
        loss_of(forward(x), target).backward()
        optimizer.step()
    return [getattr(p, "full_tensor", lambda p=p: p)().detach() for p in model.parameters()]


def network() -> nn.Module:
    return make("conv", dtype=FLOAT).cuda()


@pytest.fixture
def expected() -> list[Tensor]:
    """The parameters of the plain loop, whose updates are made in backward."""
    model = network()
    return train(model, sgd(model), model)


def by_ddp(model: nn.Module) -> nn.Module:
    return DDP(model, gradient_as_bucket_view=True)


@pytest.mark.parametrize("wrap", [by_ddp, fully_shard])
def test_a_process_alone_by_nccl(wrap: Callable, expected: list[Tensor], nccl: None) -> None:
    model = network()
    wrapped = wrap(model)
    optimizer = sgd(model)
    ghl.synchronize(wrapped, optimizer)
    torch.testing.assert_close(train(model, optimizer, wrapped), expected)


def test_a_compiled_network_in_cuda_graphs(expected: list[Tensor]) -> None:
    """Nothing is left out of the graphs, and replays give what plain steps give."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model = network()
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    optimizer = sgd(model)
    ghl.synchronize(model, optimizer)

    def forward(x: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(x)

    found = train(model, optimizer, forward)
    assert counters["inductor"]["cudagraph_skips"] == 0
    torch.testing.assert_close(found, expected)


def test_fp16_with_a_scaler() -> None:
    """A scale that overflows is a step that moves nothing; then the loss falls."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.02, fused=True)
    ghl.synchronize(model, optimizer)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)
    before = [p.detach().clone() for p in model.parameters()]
    x, target = (t.cuda() for t in batch("conv", 0, FLOAT))
    losses = []
    for step in range(60):
        with torch.autocast("cuda", torch.float16):
            y = model(x)
        loss = loss_of(y, target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step == 0:
            assert scaler.get_scale() < 2.0**40
            assert all(map(torch.equal, model.parameters(), before))
        losses.append(loss.item())
    assert 2.0 < scaler.get_scale() < 2.0**40
    assert losses[-1] < losses[0] and all(p.isfinite().all() for p in model.parameters())


def test_photographs_are_decoded_on_the_device() -> None:
    """As on a CPU, to what two decoders differ in."""
    torchvision = pytest.importorskip("torchvision")
    from ghl.recipes.photographs import Box, Encoded, decode, decodes

    assert decodes(torch.device("cuda"))
    coarse = torch.randint(256, (3, 7, 9)).float()
    image = nn.functional.interpolate(coarse[None], (70, 90), mode="bicubic")[0]
    data = torchvision.io.encode_jpeg(image.clamp(0, 255).byte(), quality=95)
    encoded = [
        Encoded(data, Box(5, 3, 64, 48), 32, 0),
        Encoded(data[:40], Box(0, 0, 8, 8), 8, 0),
    ]
    (one, none), (other, _) = (decode(encoded, torch.device(name)) for name in ("cuda", "cpu"))
    assert none is None and one.is_cuda and one.shape == other.shape == (3, 32, 32)
    assert (one.cpu().float() - other.float()).abs().mean() < 3
