"""The CLIP as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from defense.benchmarks.datasets import Task
from defense.benchmarks.methods.base import Encoder, Record, Stock
from defense.errors import ConfigError
from defense.hosts.clip import Clip
from defense.hosts.defense import Defense


@dataclass(frozen=True)
class ZeroShot:
    """Stock CLIP: what all others are compared with."""

    record: ClassVar[Record] = Record(
        "Radford et al. 2021, arXiv:2103.00020",
        "section 3.1",
    )
    name: str = "zero-shot"

    @classmethod
    def of(cls, name: str, _defense: Defense | None, strength: float | None) -> ZeroShot:
        """Return the method for a name; it has no strength to set."""
        if strength is not None:
            raise ConfigError(f"{name!r}: the stock CLIP has no strength")
        return cls(name)

    def settings(self) -> Mapping[str, Any]:
        """Return nothing: the CLIP decides all."""
        return {}

    def fit(self, clip: Clip, task: Task) -> None:
        """Learn nothing."""

    @contextmanager
    def apply(self, clip: Clip) -> Iterator[Encoder]:
        """Yield the CLIP's own embeddings."""
        yield Stock(clip)
