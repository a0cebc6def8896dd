"""The methods that are compared: each classifies with the same CLIP, pictures and prompts, in its own way.

A new one is a module with a class of the shape of `base.Method`, and a line in `FACTORIES`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from defense.benchmarks.methods.base import Encoder, Factory, Method, NotApplicableError, Stock, Unmade, by_name, needed
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
from defense.benchmarks.methods.random_latents import RandomLatents
from defense.benchmarks.methods.roboshot import RoboShot
from defense.benchmarks.methods.sampling_tar import SamplingTar
from defense.benchmarks.methods.textspan import TextSpan
from defense.benchmarks.methods.variants import Delta, OtherEdit
from defense.benchmarks.methods.zero_shot import ZeroShot
from defense.errors import ConfigError
from defense.hosts.defense import Defense

__all__ = ["FACTORIES", "Encoder", "Method", "NotApplicableError", "Stock", "Unmade", "make_methods", "needed"]

FACTORIES: Mapping[str, Factory] = {
    "zero-shot": ZeroShot.of,
    "defense": Defended.of,
    "defense-scale": partial(OtherEdit.of, edit="scale"),
    "defense-project": partial(OtherEdit.of, edit="project"),
    "defense-delta": Delta.of,
    "random-latents": RandomLatents.of,
    "naive-splice": NaiveSplice.of,
    "embedding-sae": by_name(EmbeddingSAE),
    "dyslexify": by_name(Dyslexify),
    "textspan": by_name(TextSpan),
    "ocr-blur": by_name(OcrBlur),
    "sampling-tar": by_name(SamplingTar),
    "mirror-clip": by_name(MirrorClip),
    "defense-prefix": by_name(DefensePrefix),
    "orth-cali": by_name(OrthCali),
    "roboshot": by_name(RoboShot),
    "leace": by_name(Leace),
    "erase": by_name(Erase),
}
"""Name -> from the name as typed, the defense that was given and the strength after "@" to the method."""


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
