"""sae-for-vlm: `<run>/trainer_0/checkpoints/ae_*.pt` with `<run>/trainer_0/config.json`.

The tensors are those of dictionary_learning, whose module reads them; the Matryoshka class is spelled "Matroyshka".
The configuration leaves the layer empty. The run's folder states it, "..._{layer}_{place}_...": place
"post_mlp_residual" with layer L is the output of the Hugging Face encoder layer L, our block L; "post_projection" is
the pooled image embedding.

Source: github.com/ExplainableML/sae-for-vlm, sae_train.py and models/clip.py at 69e211d.
"""

from __future__ import annotations

import re

from . import dictionary_learning
from .common import Given, Imported, Source

_RUN = re.compile(r"_(-?\d+)_(post_mlp_residual|post_projection)(?:_|$)")


def detect(source: Source) -> bool:
    """Whether it is a dictionary whose configuration spells "Matroyshka"."""
    if source.path.suffix == ".safetensors" or source.header is not None:
        return False
    return "Matroyshka" in str(dictionary_learning.stated_class(source))


def read(source: Source, given: Given) -> Imported:
    """Return the SAE of such a dictionary, with the hook point that the name of its run states."""
    return dictionary_learning.read(source, given)._replace(hook_point=_hook_point(source))


def _hook_point(source: Source) -> str | None:
    for folder in source.path.absolute().parents[:3]:
        if match := _RUN.search(folder.name):
            layer, place = int(match.group(1)), match.group(2)
            if place == "post_projection":
                return "pooled"
            return f"blocks.{layer}.hook_resid_post" if layer >= 0 else None
    return None
