"""What keeps a result out of README, docs and `benchmarks/results`: a changed checkout, or too few pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from defense.benchmarks.environment import checkout_words
from defense.errors import ConfigError

N_ASKED = "n_asked"
"""Among the facts of a result: the number of pictures that were asked for with --n."""


def problems(result: Any) -> list[str]:
    """Return why a result, as JSON values, must not be published; empty where nothing stands against it."""
    return list(dict.fromkeys(_problems(result)))


def _problems(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        if value.get("is_dirty"):
            yield f"it was measured on {checkout_words(value)}"
        if N_ASKED in value:
            yield f"it is a quick look at {value[N_ASKED]:,} pictures (--n)"
        for each in value.values():
            yield from _problems(each)
    elif isinstance(value, list):
        for each in value:
            yield from _problems(each)


def check_publishable(result: Any, what: str) -> None:
    """Raise where a result must not be published.

    Args:
        result: As JSON values.
        what: For the error, e.g. its file.

    Raises:
        ConfigError: See `problems`.
    """
    if found := problems(result):
        raise ConfigError(
            f"{what} is not for publication: {'; '.join(found)}. Measure it again from a checkout without changes, "
            "and without --n"
        )
