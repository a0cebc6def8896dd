"""The methods that are compared: each classifies with the same CLIP, pictures and prompts, in its own way.

A new one is a module with a class of the shape of `base.Method`, and a line in `FACTORIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from defense.artefact import Defense
from defense.benchmarks.methods.base import Encoder, Method
from defense.benchmarks.methods.defended import Defended
from defense.benchmarks.methods.zero_shot import ZeroShot
from defense.errors import ConfigError

__all__ = ["FACTORIES", "Encoder", "Method", "make_methods"]

FACTORIES: Mapping[str, Callable[[str, Defense | None, float | None], Method]] = {
    "zero-shot": ZeroShot.of,
    "defense": Defended.of,
}
"""Name -> from the name as typed, the defense that was given and the strength after "@" to the method."""


def make_methods(names: Sequence[str], defense: Defense | None) -> list[Method]:
    """Return methods by name; "defense@0.5" is the defense at half its strength.

    Raises:
        ConfigError: An unknown name, one that is there twice, a strength that is none, or a method that needs a defense
            where none was given.
    """
    if len(set(names)) != len(names):
        raise ConfigError(f"a method is there twice: {', '.join(names)}")
    methods = []
    for name in names:
        base, at, text = name.partition("@")
        if base not in FACTORIES:
            raise ConfigError(f"there is no method {base!r}; there are {', '.join(FACTORIES)}")
        try:
            strength = float(text) if at else None
        except ValueError as error:
            raise ConfigError(f"{name!r}: after @ comes a strength in [0, 1], e.g. {base}@0.5") from error
        methods.append(FACTORIES[base](name, defense, strength))
    return methods
