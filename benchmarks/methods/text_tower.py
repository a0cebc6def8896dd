"""Whether a text tower tells a name from the same name among other words.

A small tower that was trained on few captions may find the name and pass over all else. A method that changes what
stands around names then changes nothing, or only noise: its figure would say nothing of the method.

    cosine  =  mean over class names of  <t(NAME), t(NAME written on a sign)>
"""

from __future__ import annotations

from collections.abc import Sequence

from defense.benchmarks.datasets import Task
from defense.benchmarks.methods.base import CannotWorkError
from defense.benchmarks.methods.material import text_embeds_of
from defense.hosts.clip import Clip

CONTEXT = "{} written on a sign"
LARGEST_COSINE = 0.999
"""Above this the tower does not see the difference. That of the model `photo`, which does, is at 0.80."""

_N_NAMES = 100
"""Names that are tried, at most."""


def context_cosine(clip: Clip, names: Sequence[str]) -> float:
    """Return the mean cosine of names by themselves and in `CONTEXT`, in [-1, 1]."""
    names = [names[i * len(names) // _N_NAMES] for i in range(_N_NAMES)] if len(names) > _N_NAMES else names
    alone, among = (text_embeds_of(clip, names, (each,), normalize_each=True) for each in ("{}", CONTEXT))
    return float((alone * among).sum(1).mean())


def check_reads_context(clip: Clip, task: Task, who: str) -> None:
    """Raise where words around a name do not count.

    Raises:
        CannotWorkError: The text tower maps the task's names and the same names in `CONTEXT` to a cosine above
            `LARGEST_COSINE`; `who` needs it to tell them apart.
    """
    names = task.tests[0].class_names
    cosine = context_cosine(clip, names)
    if cosine > LARGEST_COSINE:
        raise CannotWorkError(
            f'{who} works by words around a name, and this text tower maps "{names[0]}" and '
            f'"{CONTEXT.format(names[0])}" to nearly the same: cosine {cosine:.4f}, mean over {len(names):,} names, '
            f"above {LARGEST_COSINE}"
        )
