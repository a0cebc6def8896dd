"""Made-up data sets in the forms of the real ones."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from defense.benchmarks.datasets import READERS, Example, File, Options

PARTIAL = Options(allow_partial=True)


def png(value: int = 128, size: tuple[int, int] = (40, 30)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (value, 255 - value, 7)).save(stream, "PNG")
    return stream.getvalue()


def read(name: str, folder: Path, options: Options = Options()):  # noqa: B008  # frozen
    return READERS[name].read(folder, options)


HEADER = "img_id,img_filename,y,split,place,place_filename"


def waterbird_lines(counts: dict[int, tuple[int, int, int, int]]) -> list[str]:
    """Rows with the given number of pictures: split -> groups."""
    lines, index = [HEADER], 0
    for split, groups in counts.items():
        for group, count in enumerate(groups):
            for _ in range(count):
                index += 1
                lines.append(f"{index},001.Bird/Bird_{index}.jpg,{group // 2},{split},{group % 2},/b/x.jpg")
    return lines


SMALL = {0: (4, 1, 1, 3), 1: (1, 1, 1, 1), 2: (2, 3, 1, 2)}


def write_waterbirds(folder: Path, lines: list[str], end: str = "\n") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metadata.csv").write_bytes(end.join(lines).encode())
    return folder


def example(key: str = "a", **fields) -> Example:
    return Example(**{"key": key, "picture": File(Path(key)), "label": 0, **fields})
