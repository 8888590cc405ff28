"""Writes down what a call does, for a tape to play it again.

What an operator does depends on how its tensors lie, not on their numbers: PyTorch's operators,
which a dispatch mode sees, and launches of our own kernels, of which `triton/launch.py` tells.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ghl_kernels.tapes.launches import Kernel
from ghl_kernels.tapes.tape import Address, Descriptor, Slot, Step, Tape, flat

PRIMITIVE = bool, int, float, complex
PLAIN = (
    *PRIMITIVE, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip
BY_NUMBERS = {
    torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape,
    torch.Tag.nondeterministic_seeded,
}  # fmt: skip

VIEW = torch.ops.inductor._reinterpret_tensor.default  # its offset is from that of the tensor
READ = torch.Tensor.is_neg, torch.Tensor.is_conj, operator.attrgetter("dtype")

_here = threading.local()


class Recorder(TorchDispatchMode):
    """Writes down what runs inside of it. All tensors live as long as it does.

    spoiled: why that cannot be played again, because it does something else for other tensors.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.tensors: list[Tensor] = []
        self.aliases: list[Tensor] = []  # of tensors that have a slot
        self.numbers: dict[int, int] = {}
        self.origins: dict[int, Address] = {}  # of a view: where it lies in what it is a view of
        self.spoiled: str | None = None
        self.before: Recorder | None = None
        if len({id(t) for t in inputs}) < len(inputs):
            self.spoiled = "two of its inputs are one tensor, which others' need not be"
        for t in inputs:
            self.add(t)

    def __enter__(self) -> Recorder:
        self.before, _here.recorder = recorder(), self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _here.recorder = self.before
        super().__exit__(*error)

    def add(self, t: Tensor, sources: Sequence[Tensor] = ()) -> int:
        """The slot of a tensor, which may be a view of one of the sources."""
        if id(t) in self.numbers:
            return self.numbers[id(t)]
        number = self.numbers[id(t)] = len(self.tensors)
        self.tensors.append(t)
        for source in sources:
            memory = t.untyped_storage().data_ptr()
            if t.numel() and memory == source.untyped_storage().data_ptr() != 0:
                base = self.address(source)
                offset = base.offset + t.data_ptr() - source.data_ptr()
                self.origins[number] = Address(base.slot, offset)
        return number

    def slot(self, t: Tensor) -> Slot:
        if id(t) not in self.numbers:
            self.spoiled = "it uses a tensor that it was not given"
        return Slot(self.numbers.get(id(t), 0))

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
        if not isinstance(value, PLAIN):
            self.spoiled = f"it is given a {type(value).__name__}"
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
        if BY_NUMBERS.intersection(func.tags) or any(isinstance(one, PRIMITIVE) for one in made):
            self.spoiled = f"what {func} gives depends on numbers"
        if any(isinstance(value, Slot) for value in flat(named.values())):
            self.spoiled = f"{func} is given a tensor by name"
        pure = not func._schema.is_mutable
        if not pure or any(id(one) not in self.numbers for one in made):  # not what it was given
            sources = [v for v in flat([*args, *kwargs.values()]) if isinstance(v, Tensor)]
            results = tuple(self.add(t, sources) if isinstance(t, Tensor) else None for t in made)
            step = Step(func, arguments, named, results, several, pure)
            is_view = pure and len(results) == 1 and results[0] in self.origins
            self.steps.append(self.as_view(step) if is_view else step)
        return result

    def as_view(self, step: Step) -> Step:
        """A step that makes a view of a view as one that makes it of the memory itself."""
        t, origin = self.tensors[step.made], self.origins[step.made]
        memory = self.tensors[origin.slot]
        if origin.offset % t.itemsize or any(read(memory) != read(t) for read in READ):
            return step
        lies = list(t.shape), list(t.stride()), origin.offset // t.itemsize
        return Step(VIEW, [Slot(origin.slot), *lies], {}, step.results, pure=True)

    def launched(
        self,
        again: Callable[..., Any],
        arguments: Sequence[Any],
        by_address: bool = True,
        kernel: Kernel | None = None,
    ) -> None:
        """A launch, and how to launch it again: with addresses of its tensors, or with them."""
        place: Callable[[Tensor], Any] = self.address if by_address else self.slot
        written = [self.written(value, place) for value in arguments]
        self.steps.append(Step(again, written, {}, kernel=kernel))

    def tape(self, inputs: int, outputs: Sequence[Tensor]) -> Tape | None:
        """What leads to the outputs, if that can be played again."""
        numbers = [self.slot(t).number for t in outputs]
        return None if self.spoiled else Tape(self.steps, self.tensors, inputs, numbers)


def recorder() -> Recorder | None:
    """The one inside of which this thread is."""
    return getattr(_here, "recorder", None)


def record(
    call: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], *rest: Any
) -> tuple[Sequence[Tensor], Tape | None]:
    """What `call` returns, and its tape; None if it cannot be played again, or if there is too
    little memory to keep all that it makes until its end."""
    try:
        return recorded(call, inputs, *rest)
    except torch.OutOfMemoryError:
        pass
    return call(*inputs, *rest), None


def recorded(
    call: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], *rest: Any
) -> tuple[Sequence[Tensor], Tape | None]:
    with Recorder(inputs) as here, torch._C._AutoDispatchBelowAutograd():
        outputs = call(*inputs, *rest)
        return outputs, here.tape(len(inputs), outputs)
