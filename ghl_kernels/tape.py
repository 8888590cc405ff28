"""What a call did, written down so that it can be done again for other tensors that lie alike.

What an operator does depends on how its tensors lie, not on their numbers: calls of PyTorch's
operators, which a dispatch mode sees, and launches of our own kernels, which a recorder is told of.
Played again they come without what led to them: checks, choices, views, and a compiler's look at
every argument, which together take several times as long as the launches.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ALIGNMENT = 256  # bytes from one tensor to the next in common memory
SMALL = 2**20  # bytes; larger tensors have memory of their own, which is given back on its own
EMPTY = "aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty"

Play = Callable[[list[Any]], None]  # a step, for the tensors of a tape by their slots

_here = threading.local()


class UnplayableError(Exception):
    """A call that does something else for other tensors."""


@dataclasses.dataclass(frozen=True)
class Slot:
    """The place of a tensor among those of a tape."""

    number: int


@dataclasses.dataclass(frozen=True)
class Address:
    """So many bytes behind the first number of the tensor in a slot."""

    slot: int
    offset: int


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
    slots that are filled; None for a result that is no tensor.
    """

    call: Callable[..., Any]
    arguments: list[Any]
    named: dict[str, Any]
    results: tuple[int | None, ...] = ()
    several: bool = False
    pure: bool = False  # writes nothing but its results

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


class Recorder(TorchDispatchMode):
    """Writes down what runs inside of it. All tensors live as long as it does."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.tensors: list[Tensor] = []
        self.aliases: list[Tensor] = []  # of tensors that have a slot
        self.numbers: dict[int, int] = {}
        self.origins: dict[int, Address] = {}  # of a view: where it lies in what it is a view of
        if len({id(t) for t in inputs}) < len(inputs):
            raise UnplayableError("two of its inputs are one tensor, which others' need not be")
        for t in inputs:
            self.add(t)

    def __enter__(self) -> Recorder:
        _here.recorder = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _here.recorder = None
        super().__exit__(*error)

    def add(self, t: Tensor, sources: Sequence[Tensor] = ()) -> int:
        """The slot of a tensor, which may be a view of one of the sources."""
        if id(t) in self.numbers:
            return self.numbers[id(t)]
        number = self.numbers[id(t)] = len(self.tensors)
        self.tensors.append(t)
        for source in sources:
            if t.untyped_storage().data_ptr() == source.untyped_storage().data_ptr() != 0:
                base = self.address(source)
                offset = base.offset + t.data_ptr() - source.data_ptr()
                self.origins[number] = Address(base.slot, offset)
        return number

    def slot(self, t: Tensor) -> Slot:
        if id(t) not in self.numbers:
            raise UnplayableError("it uses a tensor that it was not given")
        return Slot(self.numbers[id(t)])

    def address(self, t: Tensor) -> Address:
        number = self.slot(t).number
        return self.origins.get(number, Address(number, 0))

    def written(self, value: Any, place: Callable[[Tensor], Any]) -> Any:
        """An argument as a step keeps it."""
        if isinstance(value, Tensor):
            return place(value)
        if isinstance(value, list | tuple):
            return [self.written(one, place) for one in value]
        if hasattr(value, "block_shape"):
            return Descriptor.of(value, place(value.base))
        return value

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        arguments = [self.written(value, self.slot) for value in args]
        named = {name: self.written(value, self.slot) for name, value in kwargs.items()}
        result = func(*args, **kwargs)
        if func is torch.ops.aten.detach.default:
            self.numbers[id(result)] = self.slot(args[0]).number
            self.aliases.append(result)
            return result
        several = isinstance(result, list | tuple)
        made = list(result) if several else [result]
        pure = not func._schema.is_mutable
        if not pure or any(id(one) not in self.numbers for one in made):  # not what it was given
            sources = [v for v in flat([*args, *kwargs.values()]) if isinstance(v, Tensor)]
            results = tuple(self.add(t, sources) if isinstance(t, Tensor) else None for t in made)
            self.steps.append(Step(func, arguments, named, results, several, pure))
        return result

    def launched(
        self, again: Callable[..., Any], arguments: Sequence[Any], by_address: bool = True
    ) -> None:
        """A launch, and how to launch it again: with addresses of its tensors, or with them."""
        place: Callable[[Tensor], Any] = self.address if by_address else self.slot
        self.steps.append(Step(again, [self.written(value, place) for value in arguments], {}))


def recorder() -> Recorder | None:
    """The one inside of which this thread is."""
    return getattr(_here, "recorder", None)


class Tape:
    """The steps of a call from its inputs to its outputs, in the order of their slots.

    Steps whose results nobody wants are left out, and small memory that only kernels see is one
    allocation.
    """

    def __init__(self, recorder: Recorder, inputs: int, outputs: Sequence[Tensor]) -> None:
        self.slots = len(recorder.tensors) + 1
        self.inputs = inputs
        self.outputs = [recorder.slot(t).number for t in outputs]
        steps = wanted(recorder.steps, self.outputs)
        offsets, size = pooled(steps, recorder.tensors, self.outputs)
        pool = self.slots - 1
        self.plays: list[Play] = []
        if offsets:
            device = recorder.tensors[0].device
            self.plays.append(allocation(pool, (size,), (1,), torch.uint8, device))
        last = last_uses(steps, recorder.tensors, {*range(inputs), *self.outputs})
        for step, done in zip(steps, last, strict=True):
            if not is_empty(step):
                self.plays.append(player(moved(step, offsets, pool)))
            elif (made := step.made) not in offsets:
                t = recorder.tensors[made]
                self.plays.append(allocation(made, t.shape, t.stride(), t.dtype, t.device))
            if done:
                self.plays.append(release(done))

    def play(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What the call returns for other tensors that lie as those it was recorded with."""
        tensors: list[Any] = [*inputs, *[None] * (self.slots - self.inputs)]
        for play in self.plays:
            play(tensors)
        return tuple([tensors[number] for number in self.outputs])


def record(
    call: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], *rest: Any
) -> tuple[Sequence[Tensor], Tape | None]:
    """What `call` returns, and its tape; None if it cannot be played again."""
    try:
        with Recorder(inputs) as recorder, torch._C._AutoDispatchBelowAutograd():
            outputs = call(*inputs, *rest)
            return outputs, Tape(recorder, len(inputs), outputs)
    except UnplayableError:
        return call(*inputs, *rest), None


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
    """For each step the large tensors that nobody uses after it."""
    uses, later = [], set(kept)
    for step in reversed(steps):
        slots = {number for number in (*step.slots(), *step.results) if number is not None}
        uses.append([n for n in slots - later if tensors[n].nbytes >= SMALL])
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


def allocation(number: int, size: Any, stride: Any, dtype: torch.dtype, device: Any) -> Play:
    def play(tensors: list[Any]) -> None:
        tensors[number] = torch.empty_strided(size, stride, dtype=dtype, device=device)

    return play


def release(numbers: Sequence[int]) -> Play:
    def play(tensors: list[Any]) -> None:
        for number in numbers:
            tensors[number] = None

    return play


def player(step: Step) -> Play:
    """The step as a function that puts tensors and addresses in their places."""
    call, named, several, template = step.call, step.named, step.several, list(step.arguments)
    made = [(i, number) for i, number in enumerate(step.results) if number is not None]
    places = [(i, value.number) for i, value in enumerate(template) if isinstance(value, Slot)]
    lists = [(i, value) for i, value in enumerate(template) if isinstance(value, list)]
    addresses = [(i, v.slot, v.offset) for i, v in enumerate(template) if isinstance(v, Address)]
    described = [(i, value) for i, value in enumerate(template) if isinstance(value, Descriptor)]
    if any(isinstance(value, Slot) for value in flat(named.values())):
        raise UnplayableError(f"{call} is given a tensor by name")

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

    return play


def placed(base: Slot | Address, tensors: list[Any]) -> Any:
    """What a descriptor describes: a tensor, or its memory."""
    if isinstance(base, Slot):
        return tensors[base.number]
    return Memory(tensors[base.slot].data_ptr() + base.offset)
