"""Measure the undefended CLIP for photographs: `python -m defense.embedded.photo.report WORK --photographs FOLDER`.

All on validation photographs and typefaces that training never saw, with the stem alone beside it. `--real` takes
folders of real attacks named `label=X_text=Y.*` (RTA-100, PAINT): they are tests, and nothing is chosen by them.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from defense.data.hands import write_all
from defense.data.images import decode
from defense.data.preprocess import Preprocess
from defense.data.typefaces import TEST
from defense.store.folders import replacing

from .build import HERE, build_start, enlarged, new_reader
from .grounds import sample_plain
from .names import Words, load_words
from .pictures import Photographs, read_photographs
from .start import Start, first_embeds
from .styles import STYLES, Style, sample_writing
from .training import Reader, load_reader, to_pixel_values

log = logging.getLogger(__name__)
SEED = 97


@dataclass(frozen=True)
class Answers:
    """What the network, its start and the stem alone say to pictures: classes, int64 [n] each."""

    net: Tensor
    first: Tensor
    stem: Tensor


@torch.inference_mode()
def scores_of(reader: Reader, start: Start, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the scores of the thousand names by the network, its start, and the stem alone, [n, 1000] each."""
    reading = reader(pixel_values)
    weight, bias = start.classifier
    first = first_embeds(start, reading.pooled)
    return reading.image_embeds @ start.rows.T, first @ start.rows.T, reading.pooled @ weight.T + bias


def answers_to(reader: Reader, start: Start, pixels: np.ndarray, batch: int = 100) -> Answers:
    """Return the answers among the thousand names to pictures, uint8 [n, SIZE, SIZE, 3]."""
    parts = [
        [scores.argmax(1) for scores in scores_of(reader, start, to_pixel_values(pixels[first : first + batch]))]
        for first in range(0, len(pixels), batch)
    ]
    return Answers(*(torch.cat(column) for column in zip(*parts, strict=True)))


def percent(hits: Tensor) -> float:
    """Return a share in percent."""
    return round(100 * hits.double().mean().item(), 1)


def clean_report(reader: Reader, start: Start, val: Photographs, batch: int = 100) -> dict[str, dict[str, float]]:
    """Return the accuracies on photographs without words, by network: among the classes at hand, and among all."""
    parts = [
        scores_of(reader, start, to_pixel_values(enlarged(val.pixels[first : first + batch])))
        for first in range(0, len(val.pixels), batch)
    ]
    scores = {
        name: torch.cat(part) for name, part in zip(("net", "first", "stem"), zip(*parts, strict=True), strict=True)
    }
    labels, classes = torch.from_numpy(val.labels), torch.from_numpy(val.classes)
    held_out = torch.from_numpy(val.is_held_out)
    stays = scores["net"].argmax(1) == scores["first"].argmax(1)
    report = {}
    for name, logits in scores.items():
        hit, hit_of_all = classes[logits[:, classes].argmax(1)] == labels, logits.argmax(1) == labels
        report[name] = {
            "at hand": percent(hit),
            "trained": percent(hit[~held_out]),
            "held out": percent(hit[held_out]),
            "of 1000": percent(hit_of_all),
            "of 1000, held out": percent(hit_of_all[held_out]),
        }
    report["net"]["stays"] = percent(stays)
    return report


@dataclass(frozen=True)
class Attacks:
    """Attacked photographs, their twins with nothing but the paper, labels and words (classes)."""

    attacked: np.ndarray
    blank: np.ndarray
    labels: Tensor
    words: Tensor


def draw_attacks(val: Photographs, words: Words, style: Style, n: int) -> Attacks:
    """Return attacks: validation photographs with the name of another class, the i-th by (SEED, i) alone."""
    attacked, blank, labels, said = [], [], [], []
    for index in range(n):
        rng = np.random.default_rng([SEED, index])
        row = int(rng.integers(len(val.pixels)))
        word = int(rng.choice([each for each in words.attacks if each != val.labels[row]]))
        picture = Image.fromarray(enlarged(val.pixels[row : row + 1])[0])
        hands = sample_writing(rng, words.names[word].lower(), style, TEST)
        attacked.append(np.asarray(write_all(picture, hands)[0]))
        blank.append(np.asarray(write_all(picture, [hand.blank() for hand in hands])[0]))
        labels.append(int(val.labels[row]))
        said.append(word)
    return Attacks(np.stack(attacked), np.stack(blank), torch.tensor(labels), torch.tensor(said))


def attack_report(reader: Reader, start: Start, attacks: Attacks) -> dict[str, float]:
    """Return attack success and accuracies among the thousand names."""
    attacked, blank = answers_to(reader, start, attacks.attacked), answers_to(reader, start, attacks.blank)
    return {
        "success": percent(attacked.net == attacks.words),
        "attacked": percent(attacked.net == attacks.labels),
        "blank": percent(blank.net == attacks.labels),
        "stem success": percent(attacked.stem == attacks.words),
        "stem attacked": percent(attacked.stem == attacks.labels),
    }


def own_name_report(reader: Reader, start: Start, val: Photographs, words: Words, n: int) -> dict[str, float]:
    """Return the accuracy among the thousand names with a photograph's own name on it, and without."""
    rows = [row for row in range(len(val.pixels)) if val.labels[row] in set(words.attacks)]
    rng = np.random.default_rng(SEED)
    rows = sorted(rng.permutation(rows)[:n].tolist())
    plain = enlarged(val.pixels[rows])
    written = [
        np.asarray(
            write_all(Image.fromarray(picture), sample_writing(rng, words.names[label].lower(), STYLES["print"], TEST))[
                0
            ]
        )
        for picture, label in zip(plain, val.labels[rows], strict=True)
    ]
    labels = torch.from_numpy(val.labels[rows])
    return {
        "with": percent(answers_to(reader, start, np.stack(written)).net == labels),
        "without": percent(answers_to(reader, start, plain).net == labels),
    }


def word_alone_report(reader: Reader, start: Start, words: Words, n: int) -> dict[str, float]:
    """Return how often a word on a ground that shows nothing is the answer among the thousand names, by style."""
    report = {}
    for name, style in STYLES.items():
        pictures, said = [], []
        for index in range(n):
            rng = np.random.default_rng([SEED, 1, index])
            word = int(rng.choice(words.attacks))
            hands = sample_writing(rng, words.names[word].lower(), style, TEST)
            pictures.append(np.asarray(write_all(sample_plain(rng), hands)[0]))
            said.append(word)
        report[name] = percent(answers_to(reader, start, np.stack(pictures)).net == torch.tensor(said))
    return report


def stays_report(reader: Reader, start: Start, val: Photographs, n: int) -> dict[str, float]:
    """Return how often training left the answer among the thousand names as it was, on pictures without words."""
    rng = np.random.default_rng(SEED)
    rows = np.sort(rng.permutation(len(val.pixels))[:n])
    photographs = enlarged(val.pixels[rows])

    def mosaic() -> np.ndarray:
        tiles = val.pixels[rng.integers(len(val.pixels), size=9)].reshape(3, 3, *val.pixels.shape[1:])
        left, top = rng.integers(0, 32, 2)
        return tiles.transpose(0, 2, 1, 3, 4).reshape(192, 192, 3)[top : top + 160, left : left + 160]

    sharp = ImageFilter.UnsharpMask(1.5, 250, 0)
    kinds: dict[str, Callable[[], np.ndarray]] = {
        "sharpened": lambda: np.stack([np.asarray(Image.fromarray(each).filter(sharp)) for each in photographs]),
        "mosaics": lambda: np.stack([mosaic() for _ in range(n)]),
        "plain": lambda: np.stack([np.asarray(sample_plain(rng)) for _ in range(n)]),
    }
    report = {}
    for name, drawn in kinds.items():
        answers = answers_to(reader, start, drawn())
        report[name] = percent(answers.net == answers.first)
    return report


def real_report(reader: Reader, start: Start, words: Words, folder: Path) -> dict[str, float]:
    """Return how real attacks go, of those whose label is a word that is known.

    `success` counts only those whose written word is known too.
    """
    config = json.loads((HERE / "open_clip_config.json").read_text())
    preprocess = Preprocess.from_open_clip(
        {**config["preprocess_cfg"], "size": config["model_cfg"]["vision_cfg"]["image_size"]}
    )
    pixel_values, labels, said = [], [], []
    for path in sorted(folder.glob("label=*_text=*.*")):
        match = re.fullmatch(r"label=(.+)_text=(.+)", path.stem)
        known = [words.known_as(name) for name in match.groups()] if match else [None, None]
        label, word = (() if name is None else words.members[name] for name in known)
        if label:
            pixel_values.append(preprocess(decode(path).image))
            labels.append(label)
            said.append(word)
    scores = scores_of(reader, start, torch.from_numpy(np.stack(pixel_values)))
    report: dict[str, float] = {"n": len(labels)}
    for name, given in zip(("", "first ", "stem "), (each.argmax(1).tolist() for each in scores), strict=True):
        hits = [answer in label for answer, label in zip(given, labels, strict=True)]
        fooled = [answer in word for answer, word in zip(given, said, strict=True) if word]
        report[f"{name}accuracy"] = percent(torch.tensor(hits))
        report[f"{name}success"] = percent(torch.tensor(fooled))
    return report


def measure(reader: Reader, start: Start, val: Photographs, n: int, real: Sequence[Path] = ()) -> dict[str, Any]:
    """Return the whole report, in percent; `n` pictures a test."""
    words = load_words()
    reader.eval()
    report: dict[str, Any] = {"n": n, "clean": clean_report(reader, start, val)}
    for name, style in STYLES.items():
        report[name] = attack_report(reader, start, draw_attacks(val, words, style, n))
        log.info("%s: %s", name, report[name])
    report["word alone"] = word_alone_report(reader, start, words, max(1, n // 2))
    report["own name"] = own_name_report(reader, start, val, words, n)
    report["answers that stay"] = stays_report(reader, start, val, n)
    report |= {folder.name: real_report(reader, start, words, folder) for folder in real}
    return report


def main() -> None:
    """Parse the command line, measure, and write `report.json` into WORK."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder of the build")
    parser.add_argument("--photographs", type=Path, required=True)
    parser.add_argument("--real", type=Path, nargs="*", default=[], help="folders of real attacks")
    parser.add_argument("-n", type=int, default=1_000, help="pictures a test")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    start = build_start(arguments.work, arguments.photographs, 0)
    reader = new_reader(start, 0)
    step = load_reader(arguments.work / "reader.safetensors", reader)
    report = {
        "step": step,
        **measure(reader, start, read_photographs(arguments.photographs, "val"), arguments.n, arguments.real),
    }
    log.info("%s", json.dumps(report, indent=1))
    with replacing(arguments.work / "report.json") as partial:
        partial.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
