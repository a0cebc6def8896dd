"""OCR and blur: find words with tesseract and blur their boxes, before the picture is prepared.

No published method in itself, but the plain remedy that others are held against: it knows nothing of CLIP. Tesseract is
a program of its own; it is called on a list of pictures, twice at a time, and only for tasks on whose pictures words
are written.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image, ImageFilter

from defense.benchmarks.datasets import Task
from defense.benchmarks.methods.base import Encoder, NotApplicableError, Record
from defense.errors import BackendError
from defense.hosts.clip import Clip

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels; right and bottom are outside."""

SHORTER_SIDE = (320, 1024)
"""Least and most, in pixels, of what tesseract reads: smaller pictures are enlarged, larger ones reduced."""
LAYOUT = 11
"""Tesseract's --psm: scattered text. With 6, one block of text, it finds a little more, and more that is no text."""
LEAST_LETTERS = 3
"""A word is blurred if it has so many letters and digits; what is shorter is mostly an edge of the object."""
MARGIN = 0.15
"""Blurred around a box as well, as a share of its height."""
RADIUS = 0.5
"""Of the Gaussian blur, as a share of the box's height."""

_N_PROCESSES = 2
_WORD = "5"
_PAGE = "1"


@cache
def tesseract() -> tuple[str, str]:
    """Return path and version of tesseract.

    Raises:
        NotApplicableError: It is not installed.
    """
    path = shutil.which("tesseract")
    if path is None:
        raise NotApplicableError(
            "OCR + blur needs the program tesseract, which is not installed (Debian, Ubuntu: apt install "
            "tesseract-ocr; macOS: brew install tesseract)"
        )
    shown = subprocess.run([path, "--version"], capture_output=True, text=True, check=True)
    return path, (shown.stdout or shown.stderr).split("\n")[0].split()[-1]


def find_words(pictures: Sequence[Image.Image]) -> list[list[Box]]:
    """Return the boxes of the words on each picture.

    Raises:
        NotApplicableError: Tesseract is not installed.
        BackendError: It fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        return _read(tesseract()[0], pictures, Path(folder))


def _read(program: str, pictures: Sequence[Image.Image], folder: Path) -> list[list[Box]]:
    paths, zooms = [], []
    for number, picture in enumerate(pictures):
        zoom = float(np.clip(min(picture.size), *SHORTER_SIDE)) / min(picture.size)
        size = (round(picture.width * zoom), round(picture.height * zoom))
        paths.append(folder / f"{number}.ppm")
        picture.resize(size, Image.Resampling.BICUBIC).save(paths[-1])
        zooms.append(zoom)
    listed = folder / "pictures.txt"
    listed.write_text("".join(f"{path}\n" for path in paths))
    command = [program, str(listed), "stdout", "--psm", str(LAYOUT), "-l", "eng", "tsv"]
    done = subprocess.run(command, capture_output=True, text=True, env={"OMP_THREAD_LIMIT": "1"})
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    if done.returncode or sum(row[0] == _PAGE for row in rows) != len(pictures):
        raise BackendError(f"tesseract could not read {len(pictures)} pictures: {done.stderr.strip()[-300:]}")
    boxes: list[list[Box]] = [[] for _ in pictures]
    for row in rows:
        if row[0] == _WORD and sum(map(str.isalnum, row[11])) >= LEAST_LETTERS:
            page, left, top, width, height = (int(row[i]) for i in (1, 6, 7, 8, 9))
            scaled = np.array([left, top, left + width, top + height]) / zooms[page - 1]
            left, top, right, bottom = (int(value) for value in scaled.round())
            boxes[page - 1].append((left, top, right, bottom))
    return boxes


def blurred(picture: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """Return a picture with boxes blurred until nothing in them can be read."""
    picture = picture.copy()
    for left, top, right, bottom in boxes:
        height = bottom - top
        margin = round(MARGIN * height)
        box = (
            max(0, left - margin),
            max(0, top - margin),
            min(picture.width, right + margin),
            min(picture.height, bottom + margin),
        )
        patch = picture.crop(box).filter(ImageFilter.GaussianBlur(max(1.0, RADIUS * height)))
        picture.paste(patch, box)
    return picture


class _Blurred(Encoder):
    def image_embeds(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """Return embeddings, float32 [n, d_embed], normalized, of the pictures without their words."""
        parts = [pictures[first::_N_PROCESSES] for first in range(_N_PROCESSES)]
        boxes: list[list[Box]] = [[] for _ in pictures]
        with ThreadPoolExecutor(_N_PROCESSES) as pool:  # threads that wait for processes
            for first, found in enumerate(pool.map(find_words, [part for part in parts if part])):
                boxes[first::_N_PROCESSES] = found
        return super().image_embeds([blurred(*each) for each in zip(pictures, boxes, strict=True)])


@dataclass(frozen=True)
class OcrBlur:
    """Blur what tesseract reads."""

    record: ClassVar[Record] = Record(
        "the plain remedy; nobody's method",
        "",
        "Tesseract finds the words, and their boxes are blurred before the picture is prepared.",
    )
    name: str

    def settings(self) -> Mapping[str, Any]:
        """Return which tesseract, and how it is used."""
        return {
            "tesseract": tesseract()[1],
            "shorter_side": list(SHORTER_SIDE),
            "psm": LAYOUT,
            "least_letters": LEAST_LETTERS,
            "margin": MARGIN,
            "radius": RADIUS,
        }

    def fit(self, clip: Clip, task: Task) -> None:
        """Learn nothing.

        Raises:
            NotApplicableError: No words are written on the pictures, or tesseract is not installed.
        """
        if not any(test.is_attacked for test in task.tests):
            raise NotApplicableError(f"{self.name} needs pictures with words on them, and {task.title} has none")
        tesseract()

    @contextmanager
    def apply(self, clip: Clip) -> Iterator[Encoder]:
        """Yield the stock CLIP's embeddings of the pictures without their words."""
        yield _Blurred(clip)
