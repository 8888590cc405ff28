"""The learning rule as four independent choices and a temperature.

What each choice means is stated once, in `ghl_kernels.reference`; nothing here touches a tensor.
"""

from __future__ import annotations

import dataclasses
import difflib
import numbers
from collections.abc import Collection

CHOICES = {
    "competition": ("softmax", "linear", "hard", "softhebb"),
    "decay": ("oja", "instar", "none"),
    "gate": ("sign", "hebb", "sign_only", "gradient"),
    "normalize": ("absmax", "mean", "none"),
}


def check_choice(argument: str, value: object, choices: Collection[str]) -> None:
    """Raise a ValueError naming the argument, the value, the choices and the nearest of them."""
    if isinstance(value, str) and value in choices:
        return
    nearest = difflib.get_close_matches(str(value).lower(), choices, n=1, cutoff=0.4)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    listed = ", ".join(choices) if len(choices) <= 12 else f"{len(choices)} known names"
    raise ValueError(f"{argument} is {value!r}, must be one of {listed}{hint}")


def check_tau(tau: object) -> None:
    """Raise TypeError or ValueError unless it is a number, finite and greater than 0."""
    if isinstance(tau, bool) or not isinstance(tau, numbers.Real):
        raise TypeError(f"tau is {tau!r}, must be a number")
    if not 0 < float(tau) < float("inf"):
        raise ValueError(f"tau is {tau!r}, must be finite and greater than 0")


def totals_for(decay: str) -> str:
    """What an update with this decay needs of a layer's totals, as pairs are asked for them."""
    return "sums" if decay == "instar" else "rows"


@dataclasses.dataclass(frozen=True)
class Rule:
    """A point in the space of rules (arXiv 2601.21367 is `Rule()`, the preset `ghl`).

    competition: what u is, from the layer's output y: `softmax` (of y/tau), `linear` (y itself),
        `hard` (one-hot argmax), `softhebb` (softmax with every loser negated).
    tau: temperature of the competition, > 0; the authors' `t_invert` is 1/tau.
    decay: what is taken from H0 = uᵀx: `oja` (<H0_k, w_k> w_k), `instar` (sum(u_k) w_k), `none`.
    gate: what reaches `weight.grad`: `sign` (sign(G)|H|), `hebb` (-H), `sign_only` (sign(G)),
        `gradient` (G).
    normalize: what H is divided by: `absmax` (max|H| over the layer), `mean` (the number of rows),
        `none`.

    Raises ValueError or TypeError, naming the argument, for anything else.
    """

    competition: str = "softmax"
    tau: float = 1.0
    decay: str = "oja"
    gate: str = "sign"
    normalize: str = "absmax"

    def __post_init__(self) -> None:
        for argument, choices in CHOICES.items():
            check_choice(argument, getattr(self, argument), choices)
        check_tau(self.tau)
        object.__setattr__(self, "tau", float(self.tau))

    @classmethod
    def preset(cls, name: str) -> Rule:
        """The rule of that name: `ghl`, `hebb`, `sign` or `bp`."""
        check_choice("rule", name, PRESETS)
        return PRESETS[name]

    @classmethod
    def of(cls, rule: Rule | str) -> Rule:
        """A Rule as it is, or the preset of that name."""
        return rule if isinstance(rule, Rule) else cls.preset(rule)

    @property
    def makes_update(self) -> bool:
        """Whether what reaches `weight.grad` is another thing than the gradient."""
        return self.gate != "gradient"

    @property
    def needs_hebbian(self) -> bool:
        """Whether the update is made of more than the gradient."""
        return self.gate not in ("gradient", "sign_only")

    def replace(self, **changes: str | float) -> Rule:
        """The same rule with some choices changed, validated anew."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


PRESETS = {
    "ghl": Rule(),
    "hebb": Rule(gate="hebb"),
    "sign": Rule(gate="sign_only"),
    "bp": Rule(gate="gradient"),
}
