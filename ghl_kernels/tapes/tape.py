"""What a call did, as steps that can be done again for other tensors that lie alike.

Calls of PyTorch's operators and launches of our own kernels, without what led to them: checks,
choices, views, and a compiler's look at every argument, which together take several times as long
as the launches. `recorder.py` writes them down.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ghl_kernels.tapes.launches import Address, Described, Kernel, planned

ALIGNMENT = 256  # bytes from one tensor to the next in common memory
SMALL = 2**20  # bytes; larger tensors have memory of their own, which is given back on its own
EMPTY = "aten::empty", "aten::empty_like"

Play = Callable[[list[Any]], None]  # a step, for the tensors of a tape by their slots


@dataclasses.dataclass(frozen=True)
class Slot:
    """The place of a tensor among those of a tape."""

    number: int


@dataclasses.dataclass(frozen=True)
class Descriptor:
    """A tensor descriptor of Triton's without its tensor, which would live as long as the tape."""

    kind: type
    fields: dict[str, Any]
    base: Slot | Address

    @classmethod
    def of(cls, descriptor: Any, base: Slot | Address) -> Descriptor:
        fields = {name: value for name, value in vars(descriptor).items() if name != "base"}
        return cls(type(descriptor), fields, base)

    def for_base(self, base: Any) -> Any:
        """Another one, which was checked when the first was made."""
        descriptor: Any = object.__new__(self.kind)
        descriptor.__dict__.update(self.fields, base=base)
        return descriptor


class Memory:
    """What a tensor descriptor is asked of the tensor that it describes."""

    __slots__ = ("address",)

    def __init__(self, address: int) -> None:
        self.address = address

    def data_ptr(self) -> int:
        return self.address


@dataclasses.dataclass
class Step:
    """A call of an operator, or a launch.

    arguments, named: with Slots or Addresses for tensors, with Descriptors of them. results: the
    slots that are filled; None for a result that is no tensor. kernel: what a launch is made of.
    """

    call: Callable[..., Any]
    arguments: list[Any]
    named: dict[str, Any]
    results: tuple[int | None, ...] = ()
    several: bool = False
    pure: bool = False  # writes nothing but its results
    kernel: Kernel | None = None

    @property
    def made(self) -> int:
        """The slot of its only result."""
        (number,) = self.results
        assert number is not None
        return number

    def slots(self) -> set[int]:
        """Those that it reads, or writes into."""
        values = flat([*self.arguments, *self.named.values()])
        return {v.number for v in values if isinstance(v, Slot)} | self.addressed()

    def addressed(self) -> set[int]:
        """Those of them of which it wants the address alone."""
        return {value.slot for value in flat(self.arguments) if isinstance(value, Address)}


def flat(values: Iterable[Any]) -> list[Any]:
    """Values, those in lists and behind descriptors among them."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, list | tuple):
            found += flat(value)
        else:
            found.append(value.base if isinstance(value, Descriptor) else value)
    return found


@dataclasses.dataclass(frozen=True)
class Allocation:
    """Memory for a slot."""

    slot: int
    size: Sequence[int]
    stride: Sequence[int]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def like(cls, slot: int, t: Tensor) -> Allocation:
        return cls(slot, t.shape, t.stride(), t.dtype, t.device)


@dataclasses.dataclass(frozen=True)
class Release:
    """Slots that nobody uses any more."""

    slots: list[int]


Instruction = Allocation | Release | Step


class Tape:
    """The steps of a call from its inputs to its outputs, in the order of their slots.

    Steps whose results nobody wants are left out, and small memory that only kernels see is one
    allocation.
    """

    def __init__(
        self, steps: Sequence[Step], tensors: Sequence[Tensor], inputs: int, outputs: list[int]
    ) -> None:
        """tensors: of all slots, the inputs first; outputs: slots."""
        self.slots = len(tensors) + 1
        self.inputs, self.outputs = inputs, outputs
        steps = wanted(steps, outputs)
        offsets, size = pooled(steps, tensors, outputs)
        pool = self.slots - 1
        self.instructions: list[Instruction] = []
        if offsets:
            common = Allocation(pool, (size,), (1,), torch.uint8, tensors[0].device)
            self.instructions.append(common)
        last = last_uses(steps, tensors, {*range(inputs), *outputs})
        for step, done in zip(steps, last, strict=True):
            if not is_empty(step):
                self.instructions.append(moved(step, offsets, pool))
            elif (made := step.made) not in offsets:
                self.instructions.append(Allocation.like(made, tensors[made]))
            if done:
                self.instructions.append(Release(done))

    @functools.cached_property
    def plays(self) -> list[Play]:
        """The instructions for Python, which plays few of the tapes that csrc/replay has."""
        return [play_of(one) for one in self.instructions]

    def play(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What the call returns for other tensors that lie as those it was recorded with."""
        tensors: list[Any] = [*inputs, *[None] * (self.slots - self.inputs)]
        for play in self.plays:
            play(tensors)
        return tuple([tensors[number] for number in self.outputs])


def is_empty(step: Step) -> bool:
    """Whether it allocates and does nothing else."""
    schema = getattr(step.call, "_schema", None)
    return schema is not None and schema.name in EMPTY


def wanted(steps: Sequence[Step], outputs: Sequence[int]) -> list[Step]:
    """Those that write, or make what a later one or the caller uses."""
    used, kept = set(outputs), []
    for step in reversed(steps):
        if not step.pure or used.intersection(step.results):
            kept.append(step)
            used |= set() if is_empty(step) else step.slots()
    return kept[::-1]


def pooled(
    steps: Sequence[Step], tensors: Sequence[Tensor], outputs: Sequence[int]
) -> tuple[dict[int, int], int]:
    """Offsets in common memory of what only launches see the addresses of; and its size."""
    seen = set(outputs)
    for step in steps:
        seen |= set() if is_empty(step) else step.slots() - step.addressed()
    offsets: dict[int, int] = {}
    size = 0
    for number in (step.made for step in steps if is_empty(step)):
        t = tensors[number]
        if number not in seen and t.nbytes < SMALL:
            offsets[number] = size
            size += -(-t.nbytes // ALIGNMENT) * ALIGNMENT
    return offsets, size


def last_uses(steps: Sequence[Step], tensors: Sequence[Tensor], kept: set[int]) -> list[list[int]]:
    """For each step the tensors of large memory, views among them, that nobody uses after it."""
    uses, later = [], set(kept)
    for step in reversed(steps):
        slots = {number for number in (*step.slots(), *step.results) if number is not None}
        uses.append([n for n in slots - later if tensors[n].untyped_storage().nbytes() >= SMALL])
        later |= slots
    return uses[::-1]


def moved(step: Step, offsets: dict[int, int], pool: int) -> Step:
    """The step with the addresses of common memory in the place of those that it took over."""

    def move(value: Any) -> Any:
        if isinstance(value, Address) and value.slot in offsets:
            return Address(pool, offsets[value.slot] + value.offset)
        if isinstance(value, Descriptor):
            return dataclasses.replace(value, base=move(value.base))
        return value

    return dataclasses.replace(step, arguments=[move(value) for value in step.arguments])


def play_of(one: Instruction) -> Play:
    if isinstance(one, Allocation):
        return allocation(one)
    return release(one.slots) if isinstance(one, Release) else caller(one)


def allocation(one: Allocation) -> Play:
    number, size, stride, dtype, device = vars(one).values()

    def play(tensors: list[Any]) -> None:
        tensors[number] = torch.empty_strided(size, stride, dtype=dtype, device=device)

    return play


def release(numbers: Sequence[int]) -> Play:
    def play(tensors: list[Any]) -> None:
        for number in numbers:
            tensors[number] = None

    return play


def caller(step: Step) -> Play:
    """The step as a function that puts tensors and addresses in their places."""
    call, named, several, template = step.call, step.named, step.several, list(step.arguments)
    made = [(i, number) for i, number in enumerate(step.results) if number is not None]
    places = [(i, value.number) for i, value in enumerate(template) if isinstance(value, Slot)]
    lists = [(i, value) for i, value in enumerate(template) if isinstance(value, list)]
    addresses = [(i, v.slot, v.offset) for i, v in enumerate(template) if isinstance(v, Address)]
    described = [(i, value) for i, value in enumerate(template) if isinstance(value, Descriptor)]

    def play(tensors: list[Any]) -> None:
        arguments = template.copy()
        for i, number in places:
            arguments[i] = tensors[number]
        for i, values in lists:
            arguments[i] = [tensors[v.number] if isinstance(v, Slot) else v for v in values]
        for i, number, offset in addresses:
            arguments[i] = tensors[number].data_ptr() + offset
        for i, value in described:
            arguments[i] = value.for_base(placed(value.base, tensors))
        result = call(*arguments, **named)
        for i, number in made:
            tensors[number] = result[i] if several else result

    return play if step.kernel is None else launcher(step.kernel, step, play)


def launcher(kernel: Kernel, step: Step, otherwise: Play) -> Play:
    """A launch by csrc/launches, if it can be made by it."""
    arguments, slots = laid_out(step)
    launch = planned(kernel, arguments) if slots else None
    if launch is None:
        return otherwise

    def play(tensors: list[Any]) -> None:
        used = [tensors[slot] for slot in slots]
        if kernel.is_told() or not launch(stream_of(used[0]), [t.data_ptr() for t in used]):
            otherwise(tensors)

    return play


def laid_out(step: Step) -> tuple[list[Any], list[int]]:
    """The arguments of a launch as `planned` takes them, and the slots of its call's tensors."""
    slots = sorted(step.addressed())
    return [told(value, slots) for value in step.arguments], slots


def told(value: Any, slots: Sequence[int]) -> Any:
    """An argument as `planned` takes it, for the addresses of the tensors in those slots."""
    if isinstance(value, Address):
        return Address(slots.index(value.slot), value.offset)
    if isinstance(value, Descriptor):
        fields = value.fields
        shape, strides = tuple(fields["shape"]), tuple(fields["strides"])
        return Described(told(value.base, slots), shape, strides, fields["padding"] == "nan")
    return value


def stream_of(t: Tensor) -> int:
    """The current one of its device, as the driver knows it."""
    return torch._C._cuda_getCurrentRawStream(t.get_device())


def placed(base: Slot | Address, tensors: list[Any]) -> Any:
    """What a descriptor describes: a tensor, or its memory."""
    if isinstance(base, Slot):
        return tensors[base.number]
    return Memory(tensors[base.slot].data_ptr() + base.offset)
