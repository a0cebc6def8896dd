"""Photographs with words on them, as people write them: what the CLIP for photographs is measured on.

| variant | what is on the photograph |
|---|---|
| clean | nothing |
| neutral | the plate, tape or sticker of `attacked-print`, without ink: the ceiling of any defense against words |
| attacked-print, -display, -handwriting | the name of another class, in typefaces of that kind |
| attacked-capitals, -turned, -repeated | in print: in capitals, turned by 20 degrees, and three times |
| own-name | its own name, in print: a defense that takes evidence away loses here |
| word-only | that name on a plain gray ground, and no photograph: how well the CLIP reads, which a defense takes away |
| look-alike | strokes in lines, which look like writing from afar; no letters |
| texture | nothing, on all photographs of classes with rows of like things: keys, beads, links, patterned cloth |

The pictures are the validation split of a folder of small photographs (`embedded.photo.pictures`), the typefaces those
that occur in no training. One is chosen among the names of the folder's classes (`photo-100`), or among all thousand
names of ImageNet (`photo-1000`, where `attacked` mixes the styles). The training split holds other photographs, of
classes that the CLIP's own training saw, in other typefaces.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from defense.benchmarks.datasets.base import Dataset, Example, Options, Task
from defense.data.hands import Hand, write_all
from defense.data.images import DEFAULT_LIMITS, Limits
from defense.data.typefaces import TEST, TRAIN
from defense.embedded.photo.grounds import SIZE, draw_strokes
from defense.embedded.photo.names import load_words
from defense.embedded.photo.pictures import Photographs, Split, read_photographs
from defense.embedded.photo.styles import STYLES, Style, sample_writing

N_TEST = 400
"""Pictures of each variant."""
N_TRAIN = 1000
_SPLITS: dict[str, Split] = {"test": "val", "train": "train"}
_SEEDS = {"test": 501, "train": 502}
_TEXTURED = frozenset(
    (
        "abacus",
        "chain",
        "computer keyboard",
        "kimono",
        "organ",
        "poncho",
        "quilt",
        "remote control",
        "typewriter keyboard",
    )
)
"""Names of classes whose photographs may look like text to a network; those that the folder has are taken."""
_GRAY = 128
_SEED_STEP = 1000
"""Between the streams of one `Options.seed` and the next."""


@dataclass(frozen=True)
class Written:
    """A photograph with something on it.

    Attributes:
        pixels: Of the photograph, uint8 [side, side, 3].
        hands: What is written.
        strokes: Seed of strokes that look like writing; None without.
    """

    pixels: np.ndarray = field(repr=False)
    hands: tuple[Hand, ...] = ()
    strokes: tuple[int, ...] | None = None

    def digest(self) -> str:
        """Return a digest of what decides the pixels: photograph, hands, and the code that draws."""
        drawn = hashlib.sha256(f"{_code_sha256()}\0{self.hands!r}\0{self.strokes!r}\0".encode())
        drawn.update(self.pixels.tobytes())
        return drawn.hexdigest()

    def load(self, _limits: Limits = DEFAULT_LIMITS) -> Image.Image:
        """Return the picture, SIZE x SIZE pixels."""
        picture = Image.fromarray(self.pixels).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        if self.strokes is not None:
            picture = draw_strokes(np.random.default_rng(self.strokes), picture)
        return write_all(picture, self.hands)[0]


@lru_cache(maxsize=1)
def _code_sha256() -> str:
    """Return a digest of the modules that draw, and of the typefaces."""
    from defense.data import hands
    from defense.embedded.photo import grounds

    fonts = sorted((Path(hands.__file__).parent / "fonts").glob("*.ttf"))
    files = [Path(grounds.__file__), Path(hands.__file__), *fonts]
    return hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files)).hexdigest()


@lru_cache(maxsize=2)
def _photographs(folder: Path, split: Split) -> Photographs:
    return read_photographs(folder, split)


@dataclass(frozen=True)
class _Names:
    """What is chosen among: classes as indices into the thousand, their names, and which may be written."""

    classes: tuple[int, ...]
    names: tuple[str, ...]
    writable: tuple[int, ...]

    @classmethod
    def of(cls, classes: tuple[int, ...]) -> _Names:
        words = load_words()
        attacks = set(words.attacks)
        places = tuple(place for place, each in enumerate(classes) if each in attacks)
        return cls(classes, tuple(words.names[each] for each in classes), places)


def read(folder: Path, options: Options) -> Task:
    """Read the task with the folder's own classes; see the module.

    Args:
        folder: As `embedded.photo.pictures` takes it: `tiny-imagenet-200`, or Parquet files.
        options: The seed.

    Raises:
        ConfigError: The folder is of neither kind, or holds no photographs.
    """
    photographs = _photographs(folder, "val")
    names = _Names.of(tuple(photographs.classes.tolist()))
    train = _variants("photo-100", folder, "train", N_TRAIN, names, options)
    tests = _variants("photo-100", folder, "test", N_TEST, names, options)
    title = "Photo-100: small photographs with words on them"
    datasets = (*tests.values(), *_textured(photographs, names, options))
    return Task("photo-100", title, datasets, train["attacked"], train_clean=train["clean"])


def _textured(photographs: Photographs, names: _Names, options: Options) -> list[Dataset]:
    """Return the data set of photographs that look like text; none where the folder has no such class."""
    examples = []
    for row, each in enumerate(photographs.labels.tolist()):
        label = names.classes.index(each)
        if names.names[label] in _TEXTURED:
            examples.append(Example(f"test-row-{row:05}", Written(photographs.pixels[row]), label))
    return [_dataset("photo-100", "texture", examples, names, options)] if examples else []


def read_thousand(folder: Path, options: Options) -> Task:
    """Read the task with ImageNet's thousand names; see `read`."""
    names = _Names.of(tuple(range(1000)))
    made = _variants("photo-1000", folder, "test", N_TEST, names, options)
    attacked = [made[f"attacked-{style}"] for style in STYLES]
    share = -(-N_TEST // len(STYLES))
    mixed = [example for index, each in enumerate(attacked) for example in each.examples[index * share :][:share]]
    tests = (made["clean"], made["neutral"], _dataset("photo-1000", "attacked", mixed, names, options))
    return Task("photo-1000", "Photo-1000: the same among ImageNet's thousand names", tests)


def _variants(task: str, folder: Path, part: str, n: int, names: _Names, options: Options) -> dict[str, Dataset]:
    """Draw all variants of a part; the i-th picture by (seed, i) alone."""
    photographs = _photographs(folder, _SPLITS[part])
    photographs = photographs if part == "test" else photographs.trained_on()
    seed = _SEEDS[part] + _SEED_STEP * options.seed
    order = np.random.default_rng(seed).permutation(len(photographs.pixels))[:n]
    found: dict[str, list[Example]] = {}
    for index, row in enumerate(order.tolist()):
        label = names.classes.index(int(photographs.labels[row]))
        for variant, example in _twins(
            f"{part}-{index:05}", photographs.pixels[row], label, names, part, [seed, index]
        ):
            found.setdefault(variant, []).append(example)
    return {variant: _dataset(task, variant, examples, names, options) for variant, examples in found.items()}


def _twins(
    key: str, pixels: np.ndarray, label: int, names: _Names, part: str, seed: list[int]
) -> list[tuple[str, Example]]:
    """Return a photograph in all variants, by name. Of a training part: clean and attacked only."""
    rng = np.random.default_rng(seed)
    word = int(rng.choice([each for each in names.writable if each != label]))
    said = names.names[word].lower()
    clean = ("clean", Example(key, Written(pixels), label))
    if part == "train":
        style = Style(str(rng.choice(list(TRAIN))), cases=("lower", "title", "upper"))
        hands = sample_writing(rng, said, style, TRAIN)
        return [clean, ("attacked", Example(key, Written(pixels, hands), label, word, kind=style.kind))]
    made = {name: sample_writing(np.random.default_rng(seed), said, style, TEST) for name, style in STYLES.items()}
    blank = tuple(hand.blank() for hand in made["print"])
    twins = [clean, ("neutral", Example(key, Written(pixels, blank), label))]
    twins += [
        (f"attacked-{name}", Example(key, Written(pixels, hands), label, word, kind=name))
        for name, hands in made.items()
    ]
    if label in names.writable:
        own = sample_writing(np.random.default_rng(seed), names.names[label].lower(), STYLES["print"], TEST)
        twins.append(("own-name", Example(key, Written(pixels, own), label)))
        twins.append(("word-only", Example(key, Written(np.full_like(pixels, _GRAY), own), label)))
    return [*twins, ("look-alike", Example(key, Written(pixels, strokes=tuple(seed)), label))]


def _dataset(task: str, variant: str, examples: list[Example], names: _Names, options: Options) -> Dataset:
    facts = {
        "class_rule": "WordNet's first name of each class that no other class has",
        "code_sha256": _code_sha256(),
        "seeds": {part: seed + _SEED_STEP * options.seed for part, seed in _SEEDS.items()},
    }
    return Dataset(task, variant, tuple(examples), names.names, facts=facts)
