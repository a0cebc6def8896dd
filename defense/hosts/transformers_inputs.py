"""What prepares the inputs of a model of transformers, and how both are loaded. Reading this loads no transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from defense.data.preprocess import Preprocess
from defense.data.tokenizer import ClipTokenizer
from defense.errors import ConfigError, MissingDependencyError

SCHEME = "transformers:"
"""How the name of a model begins that transformers loads: then a folder or a hub id."""

_PROBES = ("a photo of a cat.", "Crème brûlée, 3 for $2!", "naïve 東京")


def preprocess_of(processor: Any) -> Preprocess:
    """Return how a processor, or an image processor, of transformers prepares pictures; a `Preprocess` as it is.

    Raises:
        ConfigError: It is neither, or does something that there is no `Preprocess` for.
    """
    if isinstance(processor, Preprocess):
        return processor
    image_processor = getattr(processor, "image_processor", processor)
    if not hasattr(image_processor, "to_dict"):
        raise ConfigError(
            f"{type(processor).__name__} prepares no pictures; pass an AutoProcessor, an AutoImageProcessor or a "
            "defense.data.preprocess.Preprocess"
        )
    return Preprocess.from_image_processor(image_processor.to_dict())


def tokenizer_of(processor: Any, context_length: int) -> Callable[[list[str]], np.ndarray] | None:
    """Return what makes token ids [n, context_length] of texts; None where the processor has no tokenizer.

    A tokenizer that gives the ids of CLIP's own becomes a `ClipTokenizer`, which exported bundles can bring.
    """
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None:
        return None
    found = _Padded(tokenizer, context_length)
    own = ClipTokenizer(context_length)
    return own if _agree(own(_PROBES), found(list(_PROBES))) else found


class _Padded:
    """A tokenizer of transformers, each text as long as the text tower takes: as SigLIP's was trained."""

    def __init__(self, tokenizer: Any, context_length: int) -> None:
        self._tokenizer, self._context_length = tokenizer, context_length

    def __call__(self, texts: list[str]) -> np.ndarray:
        ids = self._tokenizer(texts, padding="max_length", truncation=True, max_length=self._context_length)
        return np.asarray(ids["input_ids"], np.int64)


def _agree(own: np.ndarray, others: np.ndarray) -> bool:
    """Return whether ids [n, context_length] are the same up to the end token; what follows it is padding."""
    ends = own.argmax(1)  # the end token has the highest id
    return all((a[: end + 1] == b[: end + 1]).all() for a, b, end in zip(own, others, ends, strict=True))


@contextmanager
def loading(source: str) -> Iterator[Any]:
    """Yield transformers, to load `source` with.

    Raises:
        MissingDependencyError: transformers is not installed.
        ConfigError: It cannot load `source`.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError("transformers", "transformers") from error
    try:
        yield transformers  # not all of it is typed
    except (RuntimeError, ValueError, OSError, ImportError) as error:
        raise ConfigError(f"transformers cannot load {source!r}: {error}") from error


def load(source: str) -> tuple[Any, Any]:
    """Return a model of transformers and its processor.

    Weights are read from safetensors alone, and no code that comes with them is run.

    Args:
        source: A folder, or a hub id; one that is not cached is downloaded.

    Raises:
        MissingDependencyError, ConfigError: See `loading`.
    """
    with loading(source) as library:
        model = library.AutoModel.from_pretrained(source, use_safetensors=True, trust_remote_code=False)
        try:
            return model, library.AutoProcessor.from_pretrained(source, trust_remote_code=False)
        except (OSError, ValueError):  # a tower without texts
            return model, library.AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
