"""Find what latents of a model confuse, for the data sets `semantic` and `mini-semantic` of `defense bench`.

    python -m defense.benchmarks.confusions --out benchmarks/datasets/semantic.json
    python -m defense.benchmarks.confusions SAE --pictures FOLDER --model NAME --pretrained TAG --out confusions.json

The first is on the embedded model, with the SAE of its last block that has one, on drawn objects of seeds that no test
has. FOLDER has a folder per class; take other pictures than the ones that the attack is then measured on.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from defense.benchmarks.environment import environment_of, write_json
from defense.core.config import fingerprint
from defense.data.sources import open_pictures
from defense.errors import ConfigError, DefenseError
from defense.explain.confusions import confusions
from defense.explain.describe import examples
from defense.explain.sums import Example
from defense.hosts.clip import EMBEDDED, Clip, load_clip
from defense.hosts.shipped import MODELS
from defense.store import checkpoint
from defense.world import draws, scenes

_SEED = 62
"""Of the drawn pictures; no stream of `embedded.build.SEEDS` has it, and no data set."""
_N_KEPT = 50
"""Confusions at most: the strongest."""


def drawn_examples(clip: Clip, n: int) -> Iterator[Example]:
    """Yield n scenes of each object, nothing written on them."""
    names = list(scenes.OBJECTS)
    for index in range(n * len(names)):
        rng, name = np.random.default_rng([_SEED, index]), names[index % len(names)]
        scene = draws.sample_scene(rng, draws.sample_object(rng, name), None)
        yield Example(f"{name}-{index}", clip.preprocess(scenes.render(scene)), name)


def find(options: argparse.Namespace) -> dict[str, Any]:
    """Return what is asked for on the command line, as JSON values.

    Raises:
        DefenseError: See `checkpoint.load`, `load_clip`, `open_pictures` and `confusions.confusions`.
    """
    if (options.sae is None) != (options.pictures is None):
        raise ConfigError("give an SAE and --pictures, or neither for the embedded model")
    if options.sae is None:
        clip, stored = load_clip(EMBEDDED), checkpoint.shipped_saes(MODELS[EMBEDDED])[-1]
        names, source = tuple(scenes.OBJECTS), drawn_examples(clip, options.n)
    else:
        pictures = open_pictures([options.pictures])
        stored = checkpoint.load(options.sae)
        clip = load_clip(options.model, options.pretrained)
        stored.check_clip(clip.tower)
        names = tuple(name.replace("_", " ") for name in pictures.folders)
        source = (each._replace(label=(each.label or "").replace("_", " ")) for each in examples(clip, pictures))
    found = confusions(clip, stored.hook_point, stored.sae, source, names)
    return {
        "hook_point": stored.hook_point,
        "host": clip.tower.fingerprint(),
        "sae": fingerprint(stored.sae.parameters_numpy()),
        "n_classes": len(names),
        "confusions": [asdict(each) for each in found[:_N_KEPT]],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Find, write and print."""
    parser = argparse.ArgumentParser(
        prog="python -m defense.benchmarks.confusions", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("sae", type=Path, nargs="?", help="what `defense train` or `import` wrote")
    parser.add_argument("--pictures", type=Path, help="a folder per class")
    parser.add_argument("--model", default=EMBEDDED, help="the SAE's CLIP (default: %(default)s)")
    parser.add_argument("--pretrained", help="tag of its weights")
    parser.add_argument("--n", type=int, default=8, help="drawn pictures of each object (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="where the JSON goes")
    argv = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(argv)
    try:
        found = find(options)
    except DefenseError as error:
        parser.error(str(error))
    command = shlex.join(["python", "-m", "defense.benchmarks.confusions", *argv])
    write_json(options.out, {"environment": asdict(environment_of(command)), **found})
    for row in found["confusions"]:
        print(f"{row['shown']} for {row['aimed']}: {row['push']:.2f} logits, latent {row['latent']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
