"""Make the catalogue of the embedded model's latents: `python -m defense.embedded.catalogues WORK`.

Pictures are scenes of the kind the CLIP was trained on, from a seed of their own; a catalogue names them by seed and
index, and they are drawn again when they are looked at.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from defense.embedded import build
from defense.explain import catalogue
from defense.explain.catalogue import Catalogue
from defense.explain.describe import describe
from defense.explain.sums import Example
from defense.fit.material import Pairs
from defense.fit.selecting import GroupFit, TextFit
from defense.hosts.attach import sae_of
from defense.hosts.clip import EMBEDDED, Clip, embedded_folder, load_clip
from defense.hosts.shipped import MODELS
from defense.hosts.slim import restored
from defense.store import checkpoint, defenses
from defense.world import draws, scenes
from defense.world.draws import GROUP_SEEDS

log = logging.getLogger(__name__)

SEED = 51
"""Of the pictures; no stream of `build.SEEDS` has it, nor one of these."""
SEED_FIT = 52
WORDS = (*draws.THINGS, *scenes.PLACES, "dark hair", "blond hair")
"""What the text tower was taught."""
N_STEERED = 4
"""Pictures that each latent is steered on."""


def web_examples(n: int, seed: int, clip: Clip, side: int = scenes.SIZE) -> Iterator[Example]:
    """Yield scenes with and without words, `side` pixels wide; the class of one is the object that it shows."""
    name_of = {emoji: name for name, emoji in scenes.OBJECTS.items()}
    for index, scene in enumerate(draws.web_scenes(n, seed)):
        label = None if scene.subject is None else name_of.get(scene.subject.emoji)
        yield Example(f"scene:{seed}:{index}", clip.preprocess(scenes.render(scene, side)), label)


def group_examples(task: str, n: int, clip: Clip) -> Iterator[Example]:
    """Yield pictures of a task with groups, with their classes."""
    grouping, seed = draws.GROUPINGS[task], GROUP_SEEDS[task]
    for index, case in enumerate(grouping.draw(n, seed)):
        yield Example(f"scene:{seed}:{index}", clip.preprocess(scenes.render(case.scene)), grouping.classes[case.y])


def describe_defense(name: str, n: int, n_fit: int) -> list[Catalogue]:
    """Return the catalogues of the SAEs of a defense of the embedded model.

    Args:
        name: Of the defense, e.g. "text".
        n: Pictures to look at; for a task with groups every other one is its own.
        n_fit: Pictures for contrast and effect of a latent.
    """
    clip = load_clip(EMBEDDED)
    saes = [each.sae for each in checkpoint.shipped_saes(MODELS[EMBEDDED])]
    defense = restored(defenses.load(embedded_folder(name)), saes, own_rule=True)
    data, text_embeds = build.task_data(name, n_fit, SEED_FIT, scenes.TRAIN_FONTS, clip)
    n_own = n // 2 if name in GROUP_SEEDS else 0
    pictures = list(web_examples(n - n_own, SEED, clip))
    pictures += group_examples(name, n_own, clip) if n_own else []
    made_from = {"pictures": "embedded", "seed_pictures": SEED, "seed_fit": SEED_FIT, "n_fit": n_fit}
    found = []
    for site in defense.sites:
        sae = sae_of(site)
        fit: TextFit | GroupFit
        if isinstance(data, Pairs):
            fit = TextFit(clip, site.hook_point, sae, data, text_embeds)
        else:
            fit = GroupFit(clip, site.hook_point, sae, data, text_embeds)
        found.append(
            describe(
                clip,
                site.hook_point,
                sae,
                pictures,
                WORDS,
                columns=vars(fit.rank()),
                n_steered=N_STEERED,
                provenance=made_from,
            )
        )
        log.info("described %s", site.hook_point)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and describe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for the catalogues, e.g. defense/embedded/catalogue")
    parser.add_argument("--defense", default="text", help="of the embedded model")
    parser.add_argument("--n", type=int, default=3000, help="pictures")
    parser.add_argument("--n-fit", type=int, default=300, help="pictures for contrast and effect")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    options.work.mkdir(parents=True, exist_ok=True)
    catalogue.save(describe_defense(options.defense, options.n, options.n_fit), options.work / options.defense)


if __name__ == "__main__":
    main()
