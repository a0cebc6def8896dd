"""How well patches tell where a phrase is, on drawn pictures of which the masks are known.

    python -m defense.benchmarks.patches --out benchmarks/results/patches.json

Ways to make a heat map of a phrase, on the embedded model, without a defense where none is named:

- behind block L: from there on the CLS token sees one patch alone (`defense.explain.patches`)
- defended: the same at the default block, with the text defense at work
- logit lens: the patches of the last block, each through the final norm and the projection in the CLS token's place
- attention: what the CLS token attends to in the last block, mean over heads; it knows no phrase
- everything: the whole picture as the region, the floor

A map is enlarged to the picture bilinearly and cut at its own threshold (`patches.threshold_of`). mIoU is the mean of
the intersections over unions of region and rest; average precision needs no threshold.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from defense.benchmarks.environment import environment_of, machine_words, write_json
from defense.benchmarks.methods.heads import attention_of, cls_attention, vision_with_heads, watching
from defense.data import labels
from defense.data.labels import Prompts
from defense.explain.patches import middle_of, patch_embeds, threshold_of
from defense.hosts.clip import EMBEDDED, Clip, load_clip
from defense.store.defenses import find_defense
from defense.world import draws, scenes
from defense.world.masks import letters_mask, subject_mask

RESULTS = Path(__file__).with_name("results") / "patches.json"
_SEED = 61
"""Of the pictures; no stream of `embedded.build.SEEDS` has it."""
QUESTIONS = ("object, clean", "object, attacked", "word, attacked", "object less word")
"""What is looked for: the object on clean pictures; on attacked ones the object, the written word, and the object told
from the word by contrast."""


@dataclass(frozen=True)
class Case:
    """Pictures with what is looked for on them.

    Attributes:
        pixel_values: float32 [n, 3, height, width].
        masks: Where it is, bool [n, size, size].
        phrase: Its label, int64 [n].
        less: The label to tell it from, int64 [n]; None without contrast.
    """

    pixel_values: Tensor
    masks: np.ndarray
    phrase: Tensor
    less: Tensor | None = None


def drawn_cases(clip: Clip, n: int, seed: int) -> dict[str, Case]:
    """Return what `QUESTIONS` ask of n drawn pictures with words on them, and of their clean twins."""
    names = list(scenes.OBJECTS)
    drawn = list(draws.typographic(n, seed))
    attacked = [case.scene for case in drawn]
    clean = [scene.clean() for scene in attacked]
    pixels = {
        kind: torch.from_numpy(np.stack([clip.preprocess(scenes.render(scene)) for scene in some]))
        for kind, some in (("clean", clean), ("attacked", attacked))
    }
    label, word = (torch.tensor([names.index(getattr(case, name)) for case in drawn]) for name in ("label", "word"))
    on_clean, on_attacked = (np.stack([subject_mask(scene) for scene in some]) for some in (clean, attacked))
    letters = np.stack([letters_mask(scene) for scene in attacked])
    cases = (
        Case(pixels["clean"], on_clean, label),
        Case(pixels["attacked"], on_attacked, label),
        Case(pixels["attacked"], letters, word),
        Case(pixels["attacked"], on_attacked, label, word),
    )
    return dict(zip(QUESTIONS, cases, strict=True))


@torch.inference_mode()
def maps_of(clip: Clip, case: Case, text_embeds: Tensor) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name of each way and its heat maps, float [n, rows, columns]."""
    tower = vision_with_heads(clip.model, "the benchmark of patches")
    target = text_embeds[case.phrase] if case.less is None else text_embeds[case.phrase] - text_embeds[case.less]
    grid, n = tower.grid_size, len(case.masks)

    def heat(embeds: Tensor) -> np.ndarray:
        found: np.ndarray = torch.einsum("npd,nd->np", embeds, target).view(n, *grid).numpy()
        return found

    points = [f"blocks.{block}.hook_resid_post" for block in range(tower.n_read)]
    for point in points[:-1]:
        yield _way(point), heat(patch_embeds(tower, tower.resid(case.pixel_values, point), point))
    middle = middle_of(tower)
    with clip.defended(find_defense(EMBEDDED)):
        resid = tower.resid(case.pixel_values, middle, edited=False)
        defended = patch_embeds(tower, resid, middle)
    yield f"{_way(middle)}, defended", heat(defended)
    patches = tower.resid(case.pixel_values, points[-1])[:, tower.n_prefix :]
    yield "logit lens", heat(tower.embeds_from(patches.flatten(0, 1)[:, None], points[-1]).view(n, -1, target.shape[1]))
    seen: list[Tensor] = []
    with watching(tower, [tower.n_read - 1], lambda block, x, _: _keep(seen, tower, block, x)):
        tower.encode(tower.batch(case.pixel_values))
    yield "attention", seen[0].view(n, *grid).numpy()
    yield "everything", np.zeros((n, *grid), np.float32)


def _way(hook_point: str) -> str:
    return hook_point.removesuffix(".hook_resid_post").replace("blocks.", "behind block ")


def _keep(seen: list[Tensor], tower: Any, block: int, x: Tensor) -> None:
    """Keep the share of attention that the CLS token pays each patch, mean over heads, [n, n_patches]."""
    seen.append(cls_attention(attention_of(tower, block), x).pattern.mean(1)[:, tower.n_prefix :])


def enlarged(heat: np.ndarray, size: int) -> np.ndarray:
    """Return a map [rows, columns] in the size of a picture, bilinear, [size, size]."""
    picture = Image.fromarray(heat.astype(np.float32)).resize((size, size), Image.Resampling.BILINEAR)
    found: np.ndarray = np.asarray(picture)
    return found


def mean_iou(heat: np.ndarray, mask: np.ndarray) -> float:
    """Return the mean of the intersections over unions of a region and of the rest.

    Args:
        heat: float [rows, columns]; a map that is the same everywhere counts as a region of the whole picture.
        mask: What is right, bool [size, size].
    """
    is_flat = heat.min() == heat.max()
    region = np.ones_like(mask) if is_flat else enlarged(heat, len(mask)) > threshold_of(heat)
    pairs = ((region, mask), (~region, ~mask))
    return float(np.mean([(a & b).sum() / max((a | b).sum(), 1) for a, b in pairs]))


def average_precision(heat: np.ndarray, mask: np.ndarray) -> float:
    """Return the mean precision over the pixels of a mask, those with the largest heat first.

    Args:
        heat: float [rows, columns]; pixels of the same heat count as mixed evenly.
        mask: What is right, bool [size, size], not empty.
    """
    values, group = np.unique(-enlarged(heat, len(mask)), return_inverse=True)
    hits = np.bincount(group.ravel(), mask.ravel(), len(values))
    precision = np.cumsum(hits) / np.cumsum(np.bincount(group.ravel(), minlength=len(values)))
    return float((precision * hits).sum() / hits.sum())


def measure(clip: Clip, n: int, seed: int) -> list[dict[str, Any]]:
    """Return a row for each way and question: means over the pictures that show what is asked, with half-widths."""
    templates = labels.resolve_templates("simple")
    text_embeds = torch.from_numpy(clip.text_embeds(Prompts(tuple(scenes.OBJECTS), templates)))
    rows = []
    for question, case in drawn_cases(clip, n, seed).items():
        shown = [index for index, mask in enumerate(case.masks) if mask.any() and not mask.all()]
        for way, maps in maps_of(clip, case, text_embeds):
            row: dict[str, Any] = {"way": way, "question": question, "n": len(shown)}
            for name, score in (("miou", mean_iou), ("ap", average_precision)):
                scores = np.array([score(maps[index], case.masks[index]) for index in shown])
                row[name] = round(float(scores.mean()), 4)
                row[f"{name}_half_width"] = round(float(1.96 * scores.std(ddof=1) / len(scores) ** 0.5), 4)
            rows.append(row)
    return rows


def table(result: dict[str, Any]) -> str:
    """Return a result as a Markdown table."""
    found = {(row["way"], row["question"]): row for row in result["rows"]}
    lines = [f"| way | {' | '.join(QUESTIONS)} |", "|---" * (len(QUESTIONS) + 1) + "|"]
    for way in dict.fromkeys(row["way"] for row in result["rows"]):
        cells = [f"{found[way, question]['miou']:.3f} / {found[way, question]['ap']:.3f}" for question in QUESTIONS]
        lines.append(f"| {way}{' (default)' if way == result['default'] else ''} | {' | '.join(cells)} |")
    return "\n".join(lines)


def caption(result: dict[str, Any]) -> str:
    """Return what a reader of the table has to know."""
    widest = max(row[f"{name}_half_width"] for row in result["rows"] for name in ("miou", "ap"))
    return (
        f"Mean IoU at the map's own threshold / average precision, over {result['n']} drawn pictures with words on "
        f"them and their clean twins (unseen typefaces, seed {result['seed']}), embedded model; half of a "
        f"95 % interval at most {widest:.3f}."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(
        prog="python -m defense.benchmarks.patches", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the result goes (default: %(default)s)")
    parser.add_argument("--n", type=int, default=300, help="pictures")
    argv = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(argv)
    clip = load_clip(EMBEDDED)
    environment = environment_of(shlex.join(["python", "-m", "defense.benchmarks.patches", *argv]))
    result = {
        "environment": asdict(environment),
        "n": options.n,
        "seed": _SEED,
        "default": _way(middle_of(clip.tower)),
        "rows": measure(clip, options.n, _SEED),
    }
    write_json(options.out, result)
    print(table(result), caption(result), machine_words(result["environment"]), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
