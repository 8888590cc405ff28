"""The processes of a run: which of them this one is, what they tell each other, who has the model.

`torchrun` starts them; without it there is one process, no process group, and nothing to tell.
"""

import gc
import inspect
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class World:
    """This process among those of the run; every method is one that all processes call."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> "World":
        """The default process group's, or a world of one."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """The sum of `values` over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """What every process gave, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def average_buffers(self, model: nn.Module) -> None:
        """Give all processes the mean of their floating-point buffers: running statistics."""
        if self.size > 1:
            for buffer in model.buffers():
                if buffer.is_floating_point():
                    buffer.copy_(self.total(buffer.clone()) / self.size)


def restarted() -> bool:
    """Whether torchrun has started this worker again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@contextmanager
def process_group(backend: str, **options: Any) -> Iterator[None]:
    """The default process group, by the options of `init_process_group`.

    Without an error, no thread of the group is left in the end, if nobody keeps the group.
    """
    dist.init_process_group(backend, **options)
    group = dist.group.WORLD
    try:
        yield
    finally:
        dist.destroy_process_group()  # forgets the group; its threads end with the last reference
    # A thread of gloo's that lets go of a tensor while Python ends is killed, and the process with
    # it (pytorch issue 190489). Ours is the last reference, and waits for them without the GIL.
    gc.collect()
    del group


@contextmanager
def joined(device: str | None) -> Iterator[World]:
    """Belong to the process group that torchrun's environment describes, if there is one.

    `device` is the --device given; a GPU's process group also has gloo for objects on the CPU.
    """
    if "RANK" not in os.environ or dist.is_initialized():
        yield World.current()
        return
    backend = "gloo"
    if torch.cuda.is_available() and not (device or "cuda").startswith("cpu"):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    store, rank, size = next(dist.rendezvous("env://"))
    with process_group(backend, store=of_this_life(store), rank=rank, world_size=size):
        yield World.current()


def of_this_life(store: dist.Store) -> dist.Store:
    """The store without what workers have left in it that died before.

    torchrun's agents keep one store over restarts, whose stale addresses make processes connect
    to the dead (pytorch issue 135712). Several agents do not count their restarts alike.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return store
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        return dist.PrefixStore(f"life-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and os.environ["RANK"] == "0":
        print(
            "restarts on several nodes need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's"
            " environment: without it they may hang (pytorch issue 135712)",
            flush=True,
        )
    return store


def local_device(name: str) -> torch.device:
    """The device of that name; under torchrun `cuda` is the GPU of this process."""
    if name == "cuda" and dist.is_initialized():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(name)


def spread(model: nn.Module, device: torch.device, *, fsdp: bool) -> nn.Module:
    """What to call in training: the model itself, sharded in place, or behind DDP.

    Buffers are not sent with every forward: `World.average_buffers` does it where they are used.
    """
    if not dist.is_initialized():
        return model
    if not fsdp:
        known = inspect.signature(DistributedDataParallel).parameters
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        options: dict[str, Any] = {buffers: False, "gradient_as_bucket_view": True}
        index = [device.index] if device.type == "cuda" else None
        copies = DistributedDataParallel(model, device_ids=index, **options)
        if device.type == "cpu":
            copies.register_comm_hook(None, average_each)
        return copies
    mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
    # DTensor's caches keep the mesh for ever: it finds its group by name, but for torch.compile.
    getattr(mesh, "_pg_registry", {}).clear()
    containers = (nn.ModuleList, nn.ModuleDict)  # they have no forward to hang hooks on
    for child in model.children():
        if not isinstance(child, containers) and any(True for _ in child.parameters()):
            fully_shard(child, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def average_each(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's communication hook for runs that resume bit for bit: every gradient in a message of its
    own. DDP lays its buckets out anew after a first step, and by its place in a message, three
    processes or more add a number up in one order or another."""
    buffer = bucket.buffer().div_(dist.get_world_size())
    gradients = buffer.split([parameter.numel() for parameter in bucket.parameters()])
    sent = [dist.all_reduce(gradient, async_op=True).get_future() for gradient in gradients]
    return torch.futures.collect_all(sent).then(lambda done: buffer)


def compile_called(model: nn.Module) -> None:
    """Compile what `spread` gave: its parts one by one where the hooks of fully_shard, which no
    graph takes up, run before and after each.

    The code around forwards is one for all parts. So is its limit of recompilations, of which each
    part wants some, for training, evaluation and another size of images; and sizes that differ
    from part to part would be taken for dynamic ones.
    """
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not shards:
        model.compile()
        return
    parts = shards[1:] or shards  # the first is the model, around them
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, 8 * len(parts))
    for part in parts:
        part.forward = torch.compile(part.forward, dynamic=False)


@contextmanager
def communicating(model: nn.Module, *, last: bool) -> Iterator[None]:
    """Around a micro-batch's forward and backward: gradients travel with the `last` one only."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        yield
    elif isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
    else:
        yield


def share(items: Sequence[int], part: int, parts: int) -> Sequence[int]:
    """One of `parts` consecutive parts of `items`, whose sizes differ by one at most."""
    return items[part * len(items) // parts : (part + 1) * len(items) // parts]
