"""Layers that are their torch.nn namesakes in all but one thing: what `weight.grad` holds.

After `loss.backward()` it is the update of the layer's rule, ready for any torch.optim optimizer.
Bias and every other gradient are the ordinary ones; without gradients nothing differs at all.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from ghl import functional
from ghl.guards import check_whole, is_update
from ghl.hooks import nothing
from ghl.sums import RawSums
from ghl_kernels import Rule

HANDLER, OF_TORCH = "__torch_function__", (Tensor, nn.Parameter)


def check_module(model: object) -> None:
    """Raise a TypeError for what is no network."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}, must be an nn.Module")


def overrides_functions(t: Tensor) -> bool:
    """Whether what F.linear and others do is replaced for a subclass of tensors."""
    if type(t) in OF_TORCH:  # asked first: a graph is traced through that alone
        return False
    known = [inspect.getattr_static(kind, HANDLER) for kind in OF_TORCH]
    return inspect.getattr_static(type(t), HANDLER) not in known


def is_transformed(x: Tensor) -> bool:
    """Whether no backward will fill weight.grad: a tracer or a transform of torch.func looks."""
    if torch._C._are_functorch_transforms_active():
        return True
    if torch.compiler.is_compiling():
        # is_exporting() is true of every graph in torch 2.11
        return torch.compiler._is_exporting_flag
    return isinstance(x, torch.fx.Proxy) or torch.jit.is_tracing()


def height_width(given: Any) -> tuple[int, int]:
    """A stride, padding or dilation as nn.Conv2d takes it, also if it was set after it was made."""
    numbers = (given,) if isinstance(given, int) else tuple(given)
    return numbers[0], numbers[-1]


def padded(module: nn.Conv2d, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """x (N, C, H, W) padded where kernels cannot, and the zero padding that is left to them."""
    if module.padding_mode != "zeros":
        sides = module._reversed_padding_repeated_twice
        return F.pad(x, sides, mode=module.padding_mode), (0, 0)
    if module.padding == "valid":
        return x, (0, 0)
    if module.padding != "same":
        return x, height_width(module.padding)
    if height_width(module.stride) != (1, 1):
        raise ValueError(f"stride is {module.stride}, must be 1 with padding='same'")
    taps = zip(height_width(module.dilation), module.kernel_size, strict=True)
    height, width = (distance * (size - 1) for distance, size in taps)
    top, left = height // 2, width // 2
    if height % 2 or width % 2:
        return F.pad(x, (left, width - left, top, height - top)), (0, 0)
    return x, (top, left)


def note_transformed(sums: RawSums) -> Callable[[Tensor], None]:
    """A hook for a weight as a transform of torch.func uses it: tells its sums which backward comes
    that way, where G would be without H0. autograd.grad may."""
    owner = weakref.ref(sums)

    def note(gradient: Tensor) -> None:
        if (sums := owner()) is not None:
            sums.transformed = torch._C._current_graph_task_id()

    return note


class Plastic(nn.Module):
    """What a layer with a rule adds to its torch.nn base: the rule and its weight's raw sums.

    Sums belong to a weight; whatever replaces or moves the weight has them made anew.
    """

    weight: Any  # the base class declares it
    _rule: Rule
    _sums: RawSums | None = None

    @property
    def rule(self) -> Rule:
        """The layer's rule; may be set to a Rule or a preset's name.

        Set to one with the gate `gradient`, an update in weight.grad is dropped.
        """
        return self._rule

    @rule.setter
    def rule(self, rule: Rule | str) -> None:
        self._set_rule(rule)

    def _set_rule(self, rule: Rule | str) -> None:
        former = self.__dict__.get("_rule")
        self._rule = Rule.of(rule)
        try:
            self._attach()
        except (ValueError, TypeError, RuntimeError):
            if former is not None:  # else the layer is not made
                self._rule = former
                self._attach()
            raise
        if former is not None and not self._rule.makes_update:
            self._drop_update()

    def _drop_update(self) -> None:
        """Where no rule is left that would keep ordinary gradients from being added to it."""
        weight = self._parameters.get("weight")
        if weight is None or RawSums.present(weight) is not None:
            return
        latest = RawSums.latest(weight)
        if is_update(weight.grad) or (latest is not None and latest.is_polluted):
            weight.grad = None

    def _attach(self) -> None:
        """Make or share the sums of the present weight, if it will have an update."""
        weight, sums = self.weight, self._sums
        if sums is not None and sums.is_of(weight) and sums.serves(weight, self._rule):
            return  # what they hold is not lost
        self._detach()
        self._attach_beside()

    @property
    def _learns(self) -> bool:
        """Whether the present weight will have an update."""
        if not self._rule.makes_update:  # asked first: a parametrized weight is computed
            return False
        weight = self.weight
        return bool(weight.requires_grad and weight.numel() > 0)

    def _attach_beside(self) -> None:
        """Have sums of the present weight too. functional_call has other weights for a forward:
        what is held of those before must outlive that."""
        weight = self.weight
        if not self._learns:
            return
        if not weight.is_floating_point():
            raise TypeError(f"weight is of {weight.dtype}, must be of floating-point numbers")
        if overrides_functions(weight):
            raise TypeError(
                f"weight is a {type(weight).__name__}, which overrides what functions do with it "
                "(__torch_function__), must be a plain Parameter: use ghl.unswap or rule='bp' here"
            )
        if not weight.is_leaf:
            raise RuntimeError(
                f"weight of {type(self).__name__} is computed from other tensors (a "
                "parametrization, DataParallel or functional_call), must be a leaf: its update "
                "is made where its gradient is accumulated; use ghl.unswap or rule='bp' here"
            )
        self.__dict__["_sums"] = RawSums.of(weight, self._rule, self)

    def _detach(self) -> None:
        """Let go of the sums of the present weight, and of the one before, if functional_call had
        another."""
        found = {self._sums, RawSums.present(self.weight)}
        self.__dict__["_sums"] = None
        for sums in found:
            if sums is not None:
                sums.layers.discard(self)
                if not sums.layers:
                    sums.release()

    def _collecting(self, x: Tensor) -> RawSums | None:
        """The sums this forward is to feed; None where the plain forward is all there is."""
        if not torch.is_grad_enabled() or is_transformed(x) or not self._learns:
            return None
        if not isinstance(x, Tensor):  # whose error is PyTorch's own
            return None
        sums = self._sums
        if sums is None or not sums.live or not self._are_of_weight(sums):
            check_whole(self)
            self._attach_beside()
            sums = self._sums
        if not self._rule.needs_hebbian:
            return None
        if x.is_nested or x.layout != torch.strided:
            what = "a nested tensor" if x.is_nested else x.layout
            raise TypeError(
                f"input of {type(self).__name__} is {what}, must be a dense tensor: give it the "
                "values, or use ghl.unswap or rule='bp' here"
            )
        return sums

    def _used_plainly(self, weight: Tensor) -> Tensor:
        """The weight as the plain forward uses it. Within transforms of torch.func that makes no
        H0, and a backward outside of them must not reach it."""
        if not torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling():
            return weight
        own = isinstance(weight, nn.Parameter) and weight is self.weight  # not a computed one
        if not (own and self._learns and self._rule.needs_hebbian):
            return weight
        with temporarily_clear_interpreter_stack():
            if self._sums is None or not self._sums.is_of(weight):
                self._attach_beside()
            used = weight.view_as(weight)
            if self._sums is not None and used.requires_grad:
                used.register_hook(note_transformed(self._sums))
        return used

    def _are_of_weight(self, sums: RawSums) -> bool:
        return sums.sharded or (sums.fits(self.weight) and sums.is_of(self.weight))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._let_go_of_exchanged()
        result = super()._apply(fn, recurse)
        self._follow_weight()
        return result

    def _let_go_of_exchanged(self) -> None:
        """A shard, or with a flag of torch's any weight, is exchanged for another in place, but not
        while anything refers to it weakly."""
        weight = self._parameters.get("weight")
        in_place = torch.__future__.get_swap_module_params_on_conversion()
        exchanged = in_place or hasattr(weight, "device_mesh")
        if "_rule" not in self.__dict__ or weight is None or not exchanged:
            return
        if self._sums is not None and self._sums.held:
            raise RuntimeError(
                "a weight that is synchronized cannot be moved or converted in place (a sharded "
                "one, or with set_swap_module_params_on_conversion): call remove() on the handle "
                "of ghl.synchronize before, and ghl.synchronize afterwards"
            )
        sums: Any = RawSums.latest(self.weight)
        for layer in [self] if sums is None else [self, *sums.layers]:
            layer._detach()
        RawSums.forget(self.weight)
        if sums is not None:
            sums.hebbian._ghl_weight = nothing
        for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks") if in_place else ():
            if not getattr(weight, hooks):  # left empty, new ones would not be called
                setattr(weight, hooks, None)

    def _load_from_state_dict(self, *args: Any) -> None:
        if torch.__future__.get_swap_module_params_on_conversion():
            self._let_go_of_exchanged()
        super()._load_from_state_dict(*args)
        self._follow_weight()

    def _follow_weight(self) -> None:
        """Attach again now, not in a forward that may be traced, to a weight that changed."""
        if "_rule" in self.__dict__ and self._parameters.get("weight") is not None:
            self._attach()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_sums"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._attach()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rule={self._rule}"


class Linear(Plastic, nn.Linear):
    """nn.Linear for x (..., in_features), trained by `rule`: a Rule or a preset's name.

    Arguments and parameters are those of nn.Linear. Raises what Rule raises.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        rule: Rule | str = "ghl",
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        self._set_rule(rule)

    def forward(self, input: Tensor) -> Tensor:
        sums = self._collecting(input)
        if sums is None:
            return F.linear(input, self._used_plainly(self.weight), self.bias)
        return functional.linear(input, self.weight, self.bias, sums)


class Conv2d(Plastic, nn.Conv2d):
    """nn.Conv2d for x (N, C, H, W) or (C, H, W), trained by `rule`: a Rule or a preset's name.

    Arguments and parameters are those of nn.Conv2d. Raises what Rule raises.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: Literal["same", "valid"] | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: Any = None,
        dtype: Any = None,
        rule: Rule | str = "ghl",
    ) -> None:
        nn.Conv2d.__init__(
            self, in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype,
        )  # fmt: skip
        self._set_rule(rule)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What nn.Conv2d.forward calls, here as there, with the layer's own weight: who puts
        another in its place, or gives it another weight, gets no sums."""
        sums = self._collecting(input)
        if sums is None or weight is not self.weight or input.dim() not in (3, 4):
            return nn.Conv2d._conv_forward(self, input, self._used_plainly(weight), bias)
        x, padding = padded(self, input if input.dim() == 4 else input[None])
        stride, dilation = height_width(self.stride), height_width(self.dilation)
        y = functional.conv2d(x, weight, bias, stride, padding, dilation, self.groups, sums)
        return y if input.dim() == 4 else y[0]
