"""Build the CLIP for photographs: `python -m defense.embedded.photo.build WORK --photographs FOLDER --crops FOLDER`.

Stages, each kept in the folder WORK and resumed from there:

1. start     the stem's features of photographs, and the directions in which they differ     (start.py)
2. reader    the vision tower learns to read                                                 (training.py)
3. texts     the text tower learns where captions lie                                        (texts.py)
4. clip      both, as an open_clip `local-dir:` folder in fp16: WORK/clip
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from defense.embedded.train_clip import check_recipe
from defense.hosts.photo_tower import Stem
from defense.store.folders import replacing, write_tensors

from . import texts, training
from .grounds import SIZE, Sources
from .names import load_words
from .pictures import crops_of, read_photographs
from .start import Start, find_weights, load_stem, make_start, start_tower
from .training import Reader, to_pixel_values

log = logging.getLogger(__name__)
HERE = Path(__file__).parent
N_START = 4_000
"""Photographs that the start is made from."""


@dataclass(frozen=True)
class Recipe:
    """What the shipped model was built with."""

    tower: training.Recipe = field(default_factory=training.Recipe)
    texts: texts.Recipe = field(default_factory=texts.Recipe)


def new_model() -> open_clip.CustomTextCLIP:
    """Return the CLIP with fresh weights."""
    config = json.loads((HERE / "open_clip_config.json").read_text())["model_cfg"]
    return open_clip.CustomTextCLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"])


def enlarged(pixels: np.ndarray) -> np.ndarray:
    """Return small pictures, uint8 [n, side, side, 3], at the tower's size, as the CLIP's preprocessing does it."""
    pictures = (Image.fromarray(each).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for each in pixels)
    return np.stack([np.asarray(picture) for picture in pictures])


@torch.inference_mode()
def stem_features(stem: Stem, pixels: np.ndarray, batch: int = 100) -> tuple[Tensor, Tensor]:
    """Return the patches of the first batch, [n, D_PATCH], and the pooled features of all pictures, [n, D_POOLED]."""
    patches, pooled = [], []
    for first in range(0, len(pixels), batch):
        each, features = stem(to_pixel_values(enlarged(pixels[first : first + batch])))
        pooled.append(features)
        if first == 0:
            patches.append(each.flatten(0, 1))
    return torch.cat(patches), torch.cat(pooled)


def build_start(work: Path, photographs: Path, seed: int) -> Start:
    """Return the start, read from `work`, where it is made and kept the first time; `seed` chooses the photographs."""
    stem, classifier = load_stem(find_weights())
    path = work / "start.safetensors"
    if not path.exists():
        trained = read_photographs(photographs, "train").trained_on()
        rows = np.sort(np.random.default_rng(seed).permutation(len(trained.pixels))[:N_START])
        start = make_start(stem, classifier, *stem_features(stem, trained.pixels[rows]))
        tensors = {
            "pooled.weight": start.pooled[0], "pooled.bias": start.pooled[1],
            "patches.mean": start.patches[0], "patches.std": start.patches[1], "rows": start.rows,
        }  # fmt: skip
        with replacing(path) as partial:
            write_tensors(tensors, partial, save_file, {"logit_scale": str(start.logit_scale)})
    with safe_open(path, framework="pt") as file:
        found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        scale = float(file.metadata()["logit_scale"])
    pooled, patches = (found["pooled.weight"], found["pooled.bias"]), (found["patches.mean"], found["patches.std"])
    return Start(stem, classifier, pooled, patches, found["rows"], scale)


def build_sources(work: Path, photographs: Path, crops: Path, recipe: training.Recipe) -> Sources:
    """Return what pictures are made of: photographs that are trained on, and crops, which are kept in `work`."""
    path = work / "crops.npy"
    if not path.exists():
        with replacing(path) as partial, partial.open("wb") as file:
            np.save(file, crops_of(crops, recipe.n_crops, SIZE, recipe.seed))
    trained = read_photographs(photographs, "train").trained_on()
    return Sources(trained.pixels, trained.labels, np.load(path, mmap_mode="r"))


def new_reader(start: Start, seed: int) -> Reader:
    """Return the reader before its first lesson."""
    torch.manual_seed(seed)
    visual = new_model().visual
    start_tower(visual.trunk, visual.head.proj, start, seed)
    return Reader(visual)


def build_texts(work: Path, start: Start, recipe: texts.Recipe) -> nn.Module:
    """Train the text tower, or go on with it; return it."""
    torch.manual_seed(recipe.seed)
    text: nn.Module = new_model().text
    words = load_words()
    texts.train(work / "texts.safetensors", text, texts.Rows(start.rows, words), recipe)
    log.info("texts: %s", texts.report(text.eval(), start.rows, words))
    return text


def write_clip(folder: Path, visual: nn.Module, text: nn.Module, logit_scale: float) -> None:
    """Write both towers as an open_clip `local-dir:` folder, weights in fp16."""
    clip = new_model()
    clip.visual, clip.text = visual, text
    with torch.no_grad():
        clip.logit_scale.fill_(math.log(logit_scale))
    state = {name: tensor.half().contiguous() for name, tensor in clip.state_dict().items() if name != "text.attn_mask"}
    folder.mkdir(exist_ok=True)
    shutil.copy(HERE / "open_clip_config.json", folder)
    with replacing(folder / "open_clip_model.safetensors") as partial:
        write_tensors(state, partial, save_file)


def build(work: Path, photographs: Path, crops: Path, recipe: Recipe) -> Path:
    """Run all stages in `work`; return the folder of the CLIP.

    Raises:
        ConfigError: `work` holds files of another recipe, or something that is needed is not there.
    """
    work.mkdir(parents=True, exist_ok=True)
    check_recipe(work / "recipe.json", asdict(recipe))
    start = build_start(work, photographs, recipe.tower.seed)
    reader = new_reader(start, recipe.tower.seed)
    sources = build_sources(work, photographs, crops, recipe.tower)
    log.info("%d photographs, %d crops", len(sources.pixels), len(sources.crops))
    training.train(work / "reader.safetensors", reader, start, sources, load_words(), recipe.tower)
    text = build_texts(work, start, recipe.texts)
    write_clip(work / "clip", reader.visual, text, start.logit_scale)
    return work / "clip"


def main() -> None:
    """Parse the command line and build."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for states and results")
    parser.add_argument("--photographs", type=Path, required=True, help="tiny-imagenet-200, or Parquet files")
    parser.add_argument("--crops", type=Path, required=True, help="folder of large pictures without words")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(arguments.threads)
    build(arguments.work, arguments.photographs, arguments.crops, Recipe())


if __name__ == "__main__":
    main()
