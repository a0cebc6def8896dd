"""Which latents are edited, how, and where those numbers came from.

A `LatentSet` is S of the formula with its gains. It knows nothing of an SAE's weights; `suppress.py` joins the two.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from dataclasses import fields as dataclass_fields
from numbers import Integral, Real
from typing import Any, Literal, get_args

import numpy as np

from defense.errors import CheckpointError, ConfigError, HookPointError

Removal = Literal["scale", "project"]
"""The edits that take something away. A defense is fitted with them; "set" is for steering."""
Edit = Literal[Removal, "set"]
Scope = Literal["cls", "patch", "all"]

_OPTIONAL = "spares_high_norm"
"""Key in files that older ones do not have, and that an older version refuses."""
_N_NEAR = 20
"""How many latents of the nearest activity a control is drawn from."""


def token_slice(scope: Scope, n_prefix: int) -> slice:
    """Return the positions that a scope names; `n_prefix` tokens (CLS, registers) stand before the patches."""
    return {"all": slice(None), "cls": slice(0, 1), "patch": slice(n_prefix, None)}[scope]


@dataclass(frozen=True)
class LatentSet:
    """The latents that one defense edits at one block.

    Attributes:
        name: What they stand for, e.g. "text".
        latents: Their indices in the SAE. Repeated ones count once: the first wins.
        gains: The part of each that is kept, in [0, 1]: 0 removes it, 1 leaves it alone. One number per latent.
        edit: "scale" multiplies activations by their gain; "project" removes the span of the decoder rows of the
            latents that fire; "set" steers activations to `values`, where a gain of 0 goes all the way.
        scope: Tokens that are edited: "cls", "patch" or "all".
        values: Target activations for "set", one per latent; empty otherwise.
        scores: Column name -> one number per latent: why each was chosen.
        provenance: Where all this came from (data, seeds, version).
        spares_high_norm: Whether patches whose norm stands far above that of their picture's others are left as they
            are (see `norms.is_high`): what latents say there is not about the place.

    Numbers may come as any sequence, of numpy's kinds too; they are held as tuples of int and float.

    Raises:
        ConfigError: A value that is not one of these, or a number of values that differs from that of the latents.
        HookPointError: An unknown scope.
    """

    name: str
    latents: tuple[int, ...]
    gains: tuple[float, ...] = ()
    edit: Edit = "scale"
    scope: Scope = "all"
    values: tuple[float, ...] = ()
    scores: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    spares_high_norm: bool = False

    def __post_init__(self) -> None:
        if self.edit not in get_args(Edit):
            raise ConfigError(f"edit={self.edit!r}; it must be one of {', '.join(get_args(Edit))}")
        if self.scope not in get_args(Scope):
            raise HookPointError(f"scope={self.scope!r}; it must be one of {', '.join(get_args(Scope))}")
        for name, kind in (
            ("name", str), ("provenance", Mapping), ("scores", Mapping), ("spares_high_norm", bool),
        ):  # fmt: skip
            if not isinstance(value := getattr(self, name), kind):
                raise ConfigError(f"a latent set's {name} is {value!r}; want {kind.__name__}")
        object.__setattr__(self, "latents", self._numbers("latents", self.latents, int))
        for name in ("gains", "values"):
            object.__setattr__(self, name, self._numbers(name, getattr(self, name), float))
        scores = {key: self._numbers(f"scores[{key!r}]", column, float) for key, column in self.scores.items()}
        object.__setattr__(self, "scores", scores)
        n = len(self.latents)
        if not self.gains:
            object.__setattr__(self, "gains", (0.0,) * n)
        columns = {"gains": self.gains, **{f"scores[{key!r}]": column for key, column in self.scores.items()}}
        if self.edit == "set":
            columns["values"] = self.values
            if self.spares_high_norm:
                raise ConfigError("edit='set' steers every token of its scope; spares_high_norm goes with the others")
        elif self.values:
            raise ConfigError(f"values belong to edit='set'; this set has edit={self.edit!r}")
        for name, column in columns.items():
            if len(column) != n:
                raise ConfigError(f"set {self.name!r} has {n} latents but {len(column)} {name}; give one per latent")
        for latent, gain in zip(self.latents, self.gains, strict=True):
            if not 0 <= gain <= 1:
                raise ConfigError(f"latent {latent} has gain {gain}; it must lie in [0, 1]: 0 removes it, 1 keeps it")
        if len(set(self.latents)) != n:
            first = [self.latents.index(latent) for latent in dict.fromkeys(self.latents)]
            for name, column in self._columns(first).items():
                object.__setattr__(self, name, column)

    def _numbers(self, name: str, column: Iterable[Any], kind: type[int] | type[float]) -> tuple[Any, ...]:
        """Return a column as a tuple of finite numbers of one kind; an int is a float, a bool is neither."""
        wanted = Integral if kind is int else Real
        try:
            given = tuple(column)
            if all(isinstance(number, wanted) and not isinstance(number, bool) for number in given):
                numbers = tuple(kind(number) for number in given)
                if all(math.isfinite(number) for number in numbers):
                    return numbers
        except (TypeError, OverflowError):
            pass
        raise ConfigError(f"set {self.name!r} has {name} {column!r}; want finite numbers, of type {kind.__name__}")

    def _columns(self, rows: list[int]) -> dict[str, Any]:
        """Return the per-latent fields, restricted to some rows."""

        def pick(column: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(column[row] for row in rows) if column else ()

        return {
            "latents": pick(self.latents),
            "gains": pick(self.gains),
            "values": pick(self.values),
            "scores": {key: pick(column) for key, column in self.scores.items()},
        }

    def check_range(self, d_sae: int) -> None:
        """Raise `ConfigError` where a latent is not one of `d_sae`."""
        for latent in self.latents:
            if not 0 <= latent < d_sae:
                raise ConfigError(f"set {self.name!r} names latent {latent}; this SAE has latents 0 to {d_sae - 1}")

    def without(self, latents: frozenset[int]) -> LatentSet:
        """Return the set less the given latents."""
        return replace(self, **self._columns([i for i, latent in enumerate(self.latents) if latent not in latents]))

    @property
    def tokens(self) -> str:
        """Which tokens are edited, in words."""
        return f"{self.scope}, but for patches of high norm" if self.spares_high_norm else self.scope

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values; without `spares_high_norm` where that is false, as before there was one."""
        return {
            "name": self.name,
            "latents": list(self.latents),
            "gains": list(self.gains),
            "edit": self.edit,
            "scope": self.scope,
            "values": list(self.values),
            "scores": {key: list(column) for key, column in self.scores.items()},
            "provenance": dict(self.provenance),
            **({_OPTIONAL: True} if self.spares_high_norm else {}),
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> LatentSet:
        """Return the set that `to_dict` describes; also as older versions wrote it, with a key "unsafe".

        Raises:
            CheckpointError: A field is missing or unknown.
            ConfigError, HookPointError: See the class; or "unsafe" is not false.
        """
        names = {each.name for each in dataclass_fields(cls)} - {_OPTIONAL}
        if not isinstance(fields, dict) or fields.keys() - {"unsafe", _OPTIONAL} != names:
            got = sorted(fields) if isinstance(fields, dict) else fields
            raise CheckpointError(f"a latent set has the keys {got!r}; this version has {sorted(names)}")
        if fields.get("unsafe", False) is not False:
            raise ConfigError(
                f"a latent set has unsafe={fields['unsafe']!r}, which let gains lie outside [0, 1]; no set may have "
                "such gains any more: bring them into [0, 1] and take the key out"
            )
        return cls(**{name: fields[name] for name in (*names, _OPTIONAL) if name in fields})


def draw_alike(chosen: Sequence[int], activity: np.ndarray, rng: np.random.Generator) -> list[int]:
    """Return for each chosen latent another, drawn at random among those of like activity: a control.

    Each is drawn from the 20 that are nearest in rank; none is drawn twice, none is chosen, and all of them fire.

    Args:
        chosen: Latents, all different.
        activity: Of every latent of the SAE, summed over the same pictures, float [d_sae]; 0 where it never fires.
        rng: What draws.

    Raises:
        ConfigError: Fewer others fire than were chosen.
    """
    others = np.setdiff1d(np.flatnonzero(activity), chosen)
    if len(others) < len(chosen):
        raise ConfigError(
            f"{len(chosen)} of {len(activity)} latents are chosen, and too few others fire ({len(others)}) to draw as "
            "many; give more pictures, or choose fewer"
        )
    others = others[np.argsort(activity[others], kind="stable")]
    drawn: list[int] = []
    for latent in chosen:
        rank = np.searchsorted(activity[others], activity[latent])
        nearest = np.argsort(np.abs(np.arange(len(others)) - rank), kind="stable")[:_N_NEAR]
        pick = rng.choice(nearest)
        drawn.append(int(others[pick]))
        others = np.delete(others, pick)
    return drawn
