"""Defend the CLIP for photographs, and ship both: `python -m defense.embedded.photo.ship WORK --photographs FOLDER`.

After `build` in the same folder WORK. What a user does with the command line is done with it here:

1. pictures    photographs and sharp crops in one file, in random order      WORK/pictures.parquet
2. defense train    an SAE per block                                         WORK/sae/block-N
3. defense fit      the defense against words                                WORK/text
4. describe         the catalogue of its latents                             WORK/catalogue/text
5. all of it, the CLIP, what it was before its training and the example pictures go into the package

A stage whose result is there is not done again.
"""

from __future__ import annotations

import argparse
import io
import logging
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image

from defense.data.hands import Hand, sample_hand, write_all
from defense.data.images import decode
from defense.data.sources import open_pictures
from defense.data.typefaces import TRAIN
from defense.embedded.catalogues import web_examples
from defense.explain import catalogue
from defense.explain import describe as describing
from defense.hosts.clip import load_clip
from defense.hosts.shipped import FIRST, PHOTO
from defense.store import checkpoint
from defense.store.folders import replacing

from .build import Recipe as BuildRecipe
from .build import build_start, enlarged
from .grounds import SIZE
from .names import load_words
from .pictures import read_photographs
from .start import FIRST_EMBEDS, save_first

log = logging.getLogger(__name__)
HERE = Path(__file__).parent
LICENSE = "Apache-2.0"
"""Of what is made from the weights of the picture network."""
SEED_SCENES = 55
"""Of the drawn scenes of the catalogue; see `catalogues.SEED`."""


@dataclass(frozen=True)
class Recipe:
    """What the shipped defense was made with.

    Attributes:
        blocks: Those with an SAE, counted from 0: block 1, since from block 2 on the CLS token reads the patches.
        d_sae: Latents of each.
        n_tokens: That each SAE is trained on.
        text_rate: Share of its pictures with a word on them.
        n_photographs: Photographs to train on; each crop of the build comes on top.
        n_pictures: Pictures to fit on.
        n_described: Photographs to describe latents with, and drawn scenes.
        clean_budget: Of the fit.
        seed: Of everything.
    """

    blocks: tuple[int, ...] = (1,)
    d_sae: int = 2048
    n_tokens: int = 2_000_000
    text_rate: float = 0.6
    n_photographs: int = 16_000
    n_pictures: int = 600
    n_described: int = 2_000
    clean_budget: float = 0.01
    seed: int = 2026


def write_pictures(path: Path, photographs: Path, crops: np.ndarray, n: int, seed: int) -> None:
    """Write a Parquet file of photographs of the classes that training sees, and of crops, in random order.

    Args:
        path: The file. Columns: `image`, encoded, and `label`, a class's name, which a crop has not.
        photographs: See `read_photographs`.
        crops: uint8 [n_crops, side, side, 3].
        n: Photographs to take, at most.
        seed: Which ones, and the order.
    """
    rng = np.random.default_rng(seed)
    names = load_words().names
    trained = read_photographs(photographs, "train").trained_on()
    chosen = rng.permutation(len(trained.pixels))[:n]
    rows = [(_png(trained.pixels[row]), names[trained.labels[row]]) for row in chosen]
    rows += [(_png(crop), None) for crop in crops]
    order = rng.permutation(len(rows))
    _write_table(path, [rows[i][0] for i in order], [rows[i][1] for i in order])


def write_described(path: Path, photographs: Path, n: int, seed: int) -> None:
    """Write a Parquet file of photographs to describe latents with, a word on every other one.

    Args:
        path: The file. Columns: `image`, encoded, and `label`, a class's name.
        photographs: See `read_photographs`.
        n: How many.
        seed: Which ones, and what is written where.
    """
    rng = np.random.default_rng([seed, n])
    words, fonts = load_words(), [font for kind in TRAIN.values() for font in kind]
    trained = read_photographs(photographs, "train").trained_on()
    images, labels = [], []
    for index, row in enumerate(rng.permutation(len(trained.pixels))[:n]):
        picture = Image.fromarray(enlarged(trained.pixels[row][None])[0])
        if index % 2:
            written = words.names[int(rng.choice(words.attacks))]
            picture = write_all(picture, [sample_hand(rng, written, fonts)])[0]
        images.append(_png(np.asarray(picture)))
        labels.append(words.names[trained.labels[row]])
    _write_table(path, images, labels)


def _write_table(path: Path, images: Sequence[bytes], labels: Sequence[str | None]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with replacing(path) as partial:
        pq.write_table(pa.table({"image": images, "label": labels}), partial, row_group_size=500, compression="none")


def _png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def run(*arguments: object) -> None:
    """Run the command line in a process of its own.

    Raises:
        CalledProcessError: It failed; it has said why.
    """
    subprocess.run([sys.executable, "-m", "defense", *map(str, arguments)], check=True)


def train_sae(work: Path, block: int, recipe: Recipe) -> Path:
    """Train an SAE, rounded as it ships; return its folder."""
    folder = work / "sae" / f"block-{block}"
    if folder.exists():
        return folder
    whole = work / f"sae-{block}"
    run(
        "train", work / "pictures.parquet", "--out", whole, "--block", block, "--model", PHOTO,
        "--d-sae", recipe.d_sae, "--n-tokens", recipe.n_tokens, "--text-rate", recipe.text_rate,
        "--license", LICENSE, "--seed", recipe.seed, "--device", "cpu",
    )  # fmt: skip
    folder.parent.mkdir(exist_ok=True)
    return checkpoint.save(checkpoint.load(whole), folder, dtype=np.float16)


def fit(work: Path, out: Path, saes: Sequence[Path], recipe: Recipe) -> None:
    """Fit the defense; the names that are one word are written on pictures."""
    words = load_words()
    labels = work / "labels.txt"
    labels.write_text("\n".join(words.names[index] for index in words.attacks) + "\n")
    run(
        "fit", out, work / "pictures.parquet", "--model", PHOTO, *(each for sae in saes for each in ("--sae", sae)),
        "--labels-file", labels, "--n-pictures", recipe.n_pictures, "--clean-budget", recipe.clean_budget,
        "--scope", "patch", "--folds", "2",
        "--license", LICENSE, "--seed", recipe.seed, "--device", "cpu",
    )  # fmt: skip


def describe(work: Path, saes: Sequence[Path], recipe: Recipe) -> None:
    """Write the catalogue of the latents, named by the words that the text tower knows.

    Photographs come first, which do not ship; then as many scenes of the drawn world, which are drawn again when a
    catalogue is looked at.
    """
    clip, words = load_clip(PHOTO), tuple(load_words().members)
    photographs = open_pictures([work / "described.parquet"])
    made_from = {"pictures": photographs.fingerprint, "seed_scenes": SEED_SCENES, "host_model": PHOTO}
    found = []
    for folder in saes:
        each = checkpoint.load(folder)
        scenes = web_examples(recipe.n_described, SEED_SCENES, clip, SIZE)
        pictures = chain(describing.examples(clip, photographs), scenes)
        found.append(
            describing.describe(
                clip, each.hook_point, each.sae, pictures, words, n_steered=4, seed=recipe.seed, provenance=made_from
            )
        )
    (work / "catalogue").mkdir(exist_ok=True)
    catalogue.save(found, work / "catalogue" / FIRST)


_INK, _PAPER = (25, 25, 30), (250, 248, 240)
EXAMPLES = (
    ("cat", Hand("hammer", "nanum-pen", "plate", (0.5, 0.82), 0.2, 3.0, 0.0, 0.0, _INK, _PAPER, 0.0)),
    ("espresso", Hand("violin", "jua", "plate", (0.36, 0.85), 0.2, 3.0, 0.0, 0.0, _INK, _PAPER, 0.0)),
    ("tripod", Hand("zebra", "open-sans-bold", "plate", (0.4, 0.85), 0.2, 3.0, 0.0, 0.0, _INK, _PAPER, 0.0)),
)
"""A photograph, and what is written on it in the pictures that `defense classify` shows."""


def write_examples(folder: Path) -> None:
    """Write the example pictures: squares of photographs with words on them, and one without."""
    folder.mkdir(exist_ok=True)
    for name, hand in EXAMPLES:
        picture = decode(HERE / "photographs" / f"{name}.jpg").image
        left, top = ((extent - min(picture.size)) // 2 for extent in picture.size)
        square = picture.crop((left, top, left + min(picture.size), top + min(picture.size)))
        write_all(square, [hand])[0].save(folder / f"{name}-{hand.text}.jpg", quality=90)
    shutil.copy(HERE / "photographs" / "cat.jpg", folder)


def install_clip(work: Path, photographs: Path) -> None:
    """Put the CLIP and what it started as into the package: from then on it is called by its name."""
    shutil.copytree(work / "clip", HERE / "clip", dirs_exist_ok=True)
    start = build_start(work, photographs, BuildRecipe().tower.seed)
    save_first(start, load_clip(PHOTO).tower.fingerprint(), FIRST_EMBEDS)


def install(work: Path) -> None:
    """Put the defense, its SAEs, the catalogue and the example pictures into the package."""
    for name in (FIRST, "sae", "catalogue"):
        shutil.rmtree(HERE / name, ignore_errors=True)
        shutil.copytree(work / name, HERE / name)
    write_examples(HERE / "examples")


def main() -> None:
    """Parse the command line, and do what is left to do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="the folder of the build")
    parser.add_argument("--photographs", type=Path, required=True, help="as for the build")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    work, recipe = arguments.work, Recipe()
    install_clip(work, arguments.photographs)
    if not (work / "pictures.parquet").exists():
        crops = np.load(work / "crops.npy", mmap_mode="r")
        write_pictures(work / "pictures.parquet", arguments.photographs, crops, recipe.n_photographs, recipe.seed)
    saes = [train_sae(work, block, recipe) for block in recipe.blocks]
    if not (work / FIRST).exists():
        fit(work, work / FIRST, saes, recipe)
    if not (work / "described.parquet").exists():
        write_described(work / "described.parquet", arguments.photographs, recipe.n_described, recipe.seed)
    if not (work / "catalogue" / FIRST).exists():
        describe(work, saes, recipe)
    install(work)


if __name__ == "__main__":
    main()
