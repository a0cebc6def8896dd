"""The methods that are compared: each classifies with the same CLIP, pictures and prompts, in its own way.

A new one is a module with a class of the shape of `base.Method`, and a line in `FACTORIES`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from defense.benchmarks.methods.base import (
    CannotWorkError,
    Encoder,
    Factory,
    FromDefense,
    Method,
    NotApplicableError,
    Stock,
    Unmade,
    by_name,
    needed,
)
from defense.benchmarks.methods.before_reading import BeforeReading
from defense.benchmarks.methods.defended import Defended
from defense.benchmarks.methods.defense_prefix import DefensePrefix
from defense.benchmarks.methods.dyslexify import Dyslexify
from defense.benchmarks.methods.embedding_sae import EmbeddingSAE
from defense.benchmarks.methods.erase import Erase
from defense.benchmarks.methods.leace import Leace
from defense.benchmarks.methods.mirror_clip import MirrorClip
from defense.benchmarks.methods.naive_splice import NaiveSplice
from defense.benchmarks.methods.ocr_blur import OcrBlur
from defense.benchmarks.methods.orth_cali import OrthCali
from defense.benchmarks.methods.random_latents import DRAWS, RandomLatents
from defense.benchmarks.methods.roboshot import RoboShot
from defense.benchmarks.methods.sampling_tar import SamplingTar
from defense.benchmarks.methods.textspan import TextSpan
from defense.benchmarks.methods.variants import Delta, OtherEdit
from defense.benchmarks.methods.zero_shot import ZeroShot
from defense.benchmarks.tables import RANDOM
from defense.errors import ConfigError
from defense.hosts.defense import Defense

__all__ = [
    "FACTORIES", "CannotWorkError", "Encoder", "FromDefense", "Method", "NotApplicableError", "Stock", "Unmade",
    "all_names", "make_methods", "needed",
]  # fmt: skip

FACTORIES: Mapping[str, Factory] = {
    "zero-shot": Factory(ZeroShot.of, ZeroShot.record),
    "defense": Factory(Defended.of, Defended.record),
    "defense-scale": Factory(partial(OtherEdit.of, edit="scale"), OtherEdit.record),
    "defense-project": Factory(partial(OtherEdit.of, edit="project"), OtherEdit.record),
    "defense-delta": Factory(Delta.of, Delta.record),
    "random-latents": Factory(RandomLatents.of, RandomLatents.record),
    "naive-splice": Factory(NaiveSplice.of, NaiveSplice.record),
    "embedding-sae": by_name(EmbeddingSAE, EmbeddingSAE.record),
    "dyslexify": by_name(Dyslexify, Dyslexify.record),
    "textspan": by_name(TextSpan, TextSpan.record),
    "ocr-blur": by_name(OcrBlur, OcrBlur.record),
    "sampling-tar": by_name(SamplingTar, SamplingTar.record),
    "mirror-clip": by_name(MirrorClip, MirrorClip.record),
    "defense-prefix": by_name(DefensePrefix, DefensePrefix.record),
    "orth-cali": by_name(OrthCali, OrthCali.record),
    "roboshot": by_name(RoboShot, RoboShot.record),
    "leace": by_name(Leace, Leace.record),
    "erase": by_name(Erase, Erase.record),
    "before-reading": by_name(BeforeReading, BeforeReading.record),
}
"""Name -> from the name as typed, the defense that was given and the strength after "@" to the method."""


def all_names() -> list[str]:
    """Return what "all" stands for: each method once, and the control in several draws."""
    return [each for name in FACTORIES for each in (DRAWS if name == RANDOM else [name])]


def make_methods(names: Sequence[str], defense: Defense | None) -> list[Method]:
    """Return methods by name; "defense@0.5" is the defense at half its strength.

    A method that needs a defense where none was given is `Unmade`: to be listed as not applicable.

    Raises:
        ConfigError: An unknown name, one that is there twice, or a strength that is none.
    """
    if len(set(names)) != len(names):
        raise ConfigError(f"a method is there twice: {', '.join(names)}")
    methods: list[Method] = []
    for name in names:
        base, at, text = name.partition("@")
        if base not in FACTORIES:
            raise ConfigError(f"there is no method {base!r}; there are {', '.join(FACTORIES)}")
        try:
            strength = float(text) if at else None
        except ValueError as error:
            raise ConfigError(f"{name!r}: after @ comes a strength in [0, 1], e.g. {base}@0.5") from error
        try:
            methods.append(FACTORIES[base](name, defense, strength))
        except NotApplicableError as error:
            methods.append(Unmade(name, str(error)))
    return methods
