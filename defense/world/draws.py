"""Draw at random what scenes show: single subjects, training examples, and the tasks with their twins."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from defense.errors import ConfigError

from . import scenes
from .scenes import (
    BIRDS,
    FACES,
    MAX_TEXT_WIDTH,
    OBJECTS,
    PLACES,
    TEST_FONTS,
    Background,
    Finish,
    Scene,
    Subject,
    Writing,
    letter_edges,
    random_color,
)

# --- choosing -------------------------------------------------------------------------------------


def _contrasting(rng: np.random.Generator) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Ink and paper whose luminance differs by at least 110 gray levels."""
    weights = np.array([0.299, 0.587, 0.114])
    while True:
        ink, paper = random_color(rng), random_color(rng)
        if abs(float(np.dot(weights, ink) - np.dot(weights, paper))) >= 110:
            return ink, paper


def sample_background(rng: np.random.Generator, kind: str = "plain") -> Background:
    """Return a background of a kind ("plain", "land", "water") with random colors and texture."""
    return Background(kind, int(rng.integers(2**31)))


def sample_object(rng: np.random.Generator, name: str) -> Subject:
    """Return a named object, large and roughly central."""
    x, y = rng.uniform(0.38, 0.62, 2).tolist()
    angle = float(rng.uniform(-25, 25))
    return Subject(OBJECTS[name], (x, y), float(rng.uniform(0.45, 0.85)), angle, bool(rng.random() < 0.5))


def sample_bird(rng: np.random.Generator, kind: str) -> Subject:
    """Return a bird of a kind, rather small: its place is easier to see than the bird."""
    emoji = BIRDS[kind][rng.integers(len(BIRDS[kind]))]
    x, y = rng.uniform(0.3, 0.7, 2).tolist()
    angle = float(rng.uniform(-20, 20))
    return Subject(emoji, (x, y), float(rng.uniform(0.25, 0.5)), angle, bool(rng.random() < 0.5))


def sample_face(rng: np.random.Generator, hair: str, gender: str) -> Subject:
    """Return a face by hair ("dark", "blond") and gender ("woman", "man").

    Its hair is mixed with the other color, now more, now less, so that hair is harder to tell than gender.
    """
    tone = int(rng.integers(3))
    other = FACES["dark" if hair == "blond" else "blond", gender][tone]
    weight = float(np.clip(rng.normal(0.38, 0.12), 0, 1))
    x, y = rng.uniform(0.4, 0.6, 2).tolist()
    angle, scale = float(rng.uniform(-15, 15)), float(rng.uniform(0.4, 0.8))
    return Subject(FACES[hair, gender][tone], (x, y), scale, angle, bool(rng.random() < 0.5), (other, weight))


def sample_finish(rng: np.random.Generator, *, poor: bool = False) -> Finish:
    """Return a camera's finish; a `poor` one blurs, adds grain and loses most of the color."""
    seed = int(rng.integers(2**31))
    brightness, contrast = rng.uniform(0.8, 1.2, 2).tolist()
    if poor:
        blur, noise, saturation = rng.uniform(0.5, 1.6), rng.uniform(8, 26), rng.uniform(0.0, 0.6)
        return Finish(seed, float(blur), float(noise), brightness, contrast, float(saturation))
    blur = float(rng.uniform(0, 0.6)) if rng.random() < 0.3 else 0.0
    return Finish(seed, blur, float(rng.uniform(0, 10)), brightness, contrast, float(rng.uniform(0.6, 1.2)))


def sample_writing(rng: np.random.Generator, word: str, fonts: Sequence[str], *, anywhere: bool = False) -> Writing:
    """Return a way to write `word`: font, style, size, place, tilt and colors.

    Args:
        rng: Source of every choice.
        word: Letters a-z only.
        fonts: Names to choose from.
        anywhere: Also across the middle of the picture; otherwise its upper or lower third.
    """
    font = str(rng.choice(list(fonts)))
    unit_width = letter_edges(word, font)[-1]
    height = min(float(rng.uniform(0.19, 0.28)), MAX_TEXT_WIDTH / unit_width)
    angle = float(rng.uniform(-5, 5))
    half = unit_width * height / 2
    x = float(rng.uniform(half + 0.02, 1 - half - 0.02)) if half < 0.47 else 0.5
    if anywhere:
        y = float(rng.uniform(0.14, 0.86))
    else:
        y = float(rng.uniform(0.13, 0.3)) if rng.random() < 0.4 else float(rng.uniform(0.7, 0.87))
    style = str(rng.choice(["plate", "strip", "bare"], p=[0.5, 0.2, 0.3]))
    ink, paper = _contrasting(rng)
    return Writing(word, font, style, (x, y), height, angle, ink, paper)


def sample_scene(
    rng: np.random.Generator,
    subject: Subject | None,
    writing: Writing | None,
    *,
    kind: str = "plain",
    poor: bool = False,
) -> Scene:
    """Return a scene around a subject and a writing, with a fresh background and finish."""
    oversample = 2 if rng.random() < 0.25 else 1
    return Scene(sample_background(rng, kind), subject, writing, sample_finish(rng, poor=poor), oversample)


# --- test sets ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Typographic:
    """An object with another object's name written on it."""

    scene: Scene
    label: str
    word: str


def typographic(n: int, seed: int, fonts: Sequence[str] = TEST_FONTS) -> Iterator[Typographic]:
    """Yield `n` attacked scenes; the i-th depends on (`seed`, i) alone."""
    names = list(OBJECTS)
    for index in range(n):
        rng = np.random.default_rng([seed, index])
        label, word = (names[i] for i in rng.choice(len(names), 2, replace=False))
        scene = sample_scene(rng, sample_object(rng, label), sample_writing(rng, word, fonts))
        yield Typographic(scene, label, word)


@dataclass(frozen=True)
class Grouped:
    """A scene with a target `y` and a spurious attribute `a`, both 0 or 1. Its group is 2 y + a."""

    scene: Scene
    y: int
    a: int

    @property
    def group(self) -> int:
        """0 to 3, as in Waterbirds and CelebA (group_DRO)."""
        return 2 * self.y + self.a


def waterbirds(n: int, seed: int, correlation: float = 0.5) -> Iterator[Grouped]:
    """Yield birds on land and water: `y` is 1 for a waterbird, `a` is 1 on water.

    Args:
        n: How many.
        seed: The i-th picture depends on (`seed`, i) alone.
        correlation: Probability that a bird is in its own place: 0.95 as in the benchmark's training set, 0.5 as in
            its test.
    """
    kinds = ("landbird", "waterbird")
    for index in range(n):
        rng = np.random.default_rng([seed, index])
        y = int(rng.integers(2))
        a = y if rng.random() < correlation else 1 - y
        yield Grouped(sample_scene(rng, sample_bird(rng, kinds[y]), None, kind=PLACES[a], poor=True), y, a)


def celeba(n: int, seed: int, correlation: float = 0.5) -> Iterator[Grouped]:
    """Yield faces: `y` is 1 for blond hair, `a` is 1 for a man.

    Args:
        n: How many.
        seed: The i-th picture depends on (`seed`, i) alone.
        correlation: Probability that blond goes with woman and dark with man.
    """
    for index in range(n):
        rng = np.random.default_rng([seed, index])
        y = int(rng.integers(2))
        a = 1 - y if rng.random() < correlation else y
        face = sample_face(rng, ("dark", "blond")[y], ("woman", "man")[a])
        yield Grouped(sample_scene(rng, face, None, poor=True), y, a)


SEED = 20_26

THINGS = (*scenes.OBJECTS, "waterbird", "landbird", "woman", "man")
QUESTIONS = {"thing": THINGS, "place": scenes.PLACES, "hair": ("dark hair", "blond hair")}
"""What a picture can be asked, and the answers to choose from."""


# --- pictures -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """A scene, the question asked about it, and the index of the right answer."""

    scene: Scene
    question: str
    answer: int


def _nonsense(rng: np.random.Generator) -> str:
    return "".join(chr(ord("a") + code) for code in rng.integers(0, 26, rng.integers(3, 8)))


def draw_example(index: int) -> Example:
    """Return the training example of an index: what the web would show, in miniature."""
    rng = np.random.default_rng([SEED, index])
    lot = rng.random()
    if lot < 0.07:
        return _bird_example(rng)
    if lot < 0.13:
        return _face_example(rng)
    name, word = (THINGS[i] for i in rng.choice(len(scenes.OBJECTS), 2, replace=False))
    anywhere = rng.random() < 0.5
    poor = rng.random() < 0.05
    if lot < 0.29:  # an object
        place = str(rng.choice(["plain", "land", "water"], p=[0.8, 0.1, 0.1]))
        scene = sample_scene(rng, sample_object(rng, name), None, kind=place, poor=poor)
        if place != "plain" and rng.random() < 0.3:
            return Example(scene, "place", scenes.PLACES.index(place))
        return Example(scene, "thing", THINGS.index(name))
    if lot < 0.65:  # a word
        writing = sample_writing(rng, word, scenes.TRAIN_FONTS, anywhere=True)
        return Example(sample_scene(rng, None, writing, poor=poor), "thing", THINGS.index(word))
    subject = sample_object(rng, name)
    if lot < 0.82:  # an object with an empty plate, or with letters that are no word
        writing = sample_writing(rng, _nonsense(rng), scenes.TRAIN_FONTS, anywhere=anywhere)
        scene = sample_scene(rng, subject, writing, poor=poor)
        return Example(scene.neutral() if lot < 0.70 else scene, "thing", THINGS.index(name))
    if lot < 0.89:  # an object and its own name
        writing = sample_writing(rng, name, scenes.TRAIN_FONTS, anywhere=anywhere)
        return Example(sample_scene(rng, subject, writing, poor=poor), "thing", THINGS.index(name))
    writing = sample_writing(rng, word, scenes.TRAIN_FONTS, anywhere=anywhere)
    said = word if rng.random() < 0.9 else name  # captions name what is written nine times in ten
    return Example(sample_scene(rng, subject, writing, poor=poor), "thing", THINGS.index(said))


def _bird_example(rng: np.random.Generator) -> Example:
    """A bird in its place, or before a plain background: only there, nothing but the bird tells its kind."""
    (bird,) = waterbirds(1, int(rng.integers(2**31)), correlation=0.95)
    lot = rng.random()
    if lot < 0.25:
        return Example(bird.scene, "place", bird.a)
    scene = replace(bird.scene, background=sample_background(rng)) if lot < 0.5 else bird.scene
    return Example(scene, "thing", THINGS.index(("landbird", "waterbird")[bird.y]))


def _face_example(rng: np.random.Generator) -> Example:
    (face,) = celeba(1, int(rng.integers(2**31)), correlation=0.95)
    if rng.random() < 0.4:
        return Example(face.scene, "thing", THINGS.index(("woman", "man")[face.a]))
    return Example(face.scene, "hair", face.y)


@dataclass(frozen=True)
class Grouping:
    """A task with groups: how to draw n pictures of a seed, the classes, and the template of their prompts."""

    draw: Callable[[int, int], Iterator[Grouped]]
    classes: tuple[str, ...]
    template: str


GROUPINGS = {
    "waterbirds": Grouping(waterbirds, ("landbird", "waterbird"), "a photo of a {}."),
    "celeba": Grouping(celeba, ("dark hair", "blond hair"), "a photo of a person with {}."),
}


def web_scenes(n: int, seed: int) -> list[Scene]:
    """Return fresh pictures of the kind the CLIP was trained on: every fourth shows an attack."""
    first = 10**9 + seed * 10**6  # far beyond the indices of training
    attacks = iter(typographic(n // 4 + 1, 10_000 + seed, scenes.TRAIN_FONTS))
    return [next(attacks).scene if i % 4 == 0 else draw_example(first + i).scene for i in range(n)]


GROUP_SEEDS = {"waterbirds": 53, "celeba": 54}
"""Of the pictures of a task with groups."""

_ATTACK_EVERY = 4
_TASK_OF = {seed: task for task, seed in GROUP_SEEDS.items()}


def scene_of(key: str) -> Scene:
    """Return the scene of a key, "scene:<seed>:<index>": a picture of a task with groups, or of `web_scenes`.

    Raises:
        ConfigError: The key is none of this form.
    """
    kind, _, place = key.partition(":")
    seed_text, _, index_text = place.partition(":")
    if kind != "scene" or not (seed_text.isdecimal() and index_text.isdecimal()):
        raise ConfigError(f"{key!r} names no scene; want 'scene:<seed>:<index>'")
    seed, index = int(seed_text), int(index_text)
    if seed in _TASK_OF:
        return next(islice(GROUPINGS[_TASK_OF[seed]].draw(index + 1, seed), index, None)).scene
    if index % _ATTACK_EVERY == 0:
        nth = index // _ATTACK_EVERY
        return next(islice(typographic(nth + 1, 10_000 + seed, scenes.TRAIN_FONTS), nth, None)).scene
    return draw_example(10**9 + seed * 10**6 + index).scene
