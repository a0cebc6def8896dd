"""How much of the defense a graph is told to apply: an input of the graph, with a place for each picture."""

from __future__ import annotations

from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from defense.errors import ConfigError
from defense.export.repository import STRENGTH


def checked(strength: float) -> float:
    """Return a strength as a float.

    Raises:
        ConfigError: It is no number in [0, 1].
    """
    if not isinstance(strength, Real) or not 0 <= strength <= 1:
        raise ConfigError(
            f"strength={strength!r}; it must lie in [0, 1]: 0 is the CLIP without its defense, 1 all of it"
        )
    return float(strength)


def input_of(session: Any) -> Any:
    """Return the input of a session's graph for a strength, or None."""
    values = (*session.get_inputs(), *session.get_overridable_initializers())
    return next((value for value in values if value.name == STRENGTH), None)


def is_needed(session: Any) -> bool:
    """Return whether a graph has to be fed a strength: those that a server's layout gave an input of their own."""
    return any(value.name == STRENGTH for value in session.get_inputs())


def fed(session: Any, strengths: np.ndarray, folder: Path) -> np.ndarray:
    """Return strengths [batch] as a graph takes them: those of an earlier version take one, without an axis.

    Args:
        session: Of the graph.
        strengths: Of each picture, in [0, 1], float32 [batch].
        folder: The bundle's, for the message.

    Raises:
        ConfigError: The graph takes none, or one and they differ.
    """
    taken = input_of(session)
    if taken is not None and taken.shape:
        return strengths
    if taken is None or (strengths != strengths[0]).any():
        takes = "no strength" if taken is None else "one strength for a whole batch"
        raise ConfigError(f"the graph in {folder} takes {takes}; export the defense again")
    return strengths[:1].reshape(())
