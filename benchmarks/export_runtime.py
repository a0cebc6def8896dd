"""The second table of the benchmark of exported graphs: the runtime without torch, on the embedded model's bundles."""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from defense.benchmarks.cost import Ratio, per_s, time_interleaved
from defense.classify.classifier import RobustClassifier
from defense.data import images
from defense.export.exporter import export_onnx
from defense.export.layouts import Dtype, Mode
from defense.export.runtime import OnnxClassifier
from defense.hosts.attach import detach
from defense.hosts.clip import EMBEDDED
from defense.hosts.defense import Defense
from defense.hosts.shipped import MODELS
from defense.hosts.slim import restored
from defense.store import checkpoint
from defense.world.draws import typographic
from defense.world.scenes import OBJECTS, render

_ROUNDS = 5
_DTYPES: tuple[Dtype, ...] = ("fp32", "int8")


@dataclass(frozen=True)
class EightBits:
    """What int8 changes for one mode of the graph.

    Attributes:
        mode: "exact" for the defense with the TopK rule of its SAEs, "delta" for the calibrated one that ships; see
            `defense.export.vision`.
        fp32_per_s: Pictures through the fp32 graph, per second.
        int8_per_s: Pictures through the int8 graph, per second.
        x_fp32: Ratio of the int8 graph's time to the fp32 graph's.
        agreement: Share of pictures with the label of the fp32 bundle.
    """

    mode: str
    fp32_per_s: float
    int8_per_s: float
    x_fp32: Ratio
    agreement: float


@dataclass(frozen=True)
class Runtime:
    """The figures of the runtime; the names of the fields are the keys of the stored result.

    Attributes:
        n: Pictures.
        batch: Pictures per call of the graph.
        picture_px: Width and height of the pictures as stored.
        decode_per_s: Files decoded by one thread, per second.
        preprocess_per_s: Pictures resized and normalized by one thread, per second.
        all_per_s: Files to labels with the fp32 bundle of the defense as it is, per second.
        eight_bits: What int8 changes, for each mode.
        first_answer_s: From the start of the import to the first answer in a fresh process, median of five.
    """

    n: int
    batch: int
    picture_px: int
    decode_per_s: float
    preprocess_per_s: float
    all_per_s: float
    eight_bits: tuple[EightBits, ...]
    first_answer_s: float


def measure_runtime(n: int, batch: int, seed: int) -> Runtime:
    """Return the figures of the second table.

    Args:
        n: Pictures, of the embedded world.
        batch: Pictures per call of the graph.
        seed: Of the pictures.
    """
    pictures = [render(each.scene) for each in typographic(n, seed)]
    files = []
    for picture in pictures:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=95)
        files.append(file.getvalue())
    with tempfile.TemporaryDirectory() as folder:
        bundles = export_embedded(Path(folder), batch)
        clf = bundles["exact", "fp32"]
        decoded = [images.decode(file).image for file in files]
        pixel_values = np.stack([clf.bundle.preprocess(image) for image in decoded])
        chunks = np.array_split(pixel_values, max(1, n // batch))
        with_graph = {" ".join(key): partial(_encode_all, each, chunks) for key, each in bundles.items()}
        times = time_interleaved(with_graph, _ROUNDS, seed)
        labels = {" ".join(key): each.predict(files) for key, each in bundles.items()}
        first = Path(folder) / "first.jpg"
        first.write_bytes(files[0])
        return Runtime(
            n=n,
            batch=batch,
            picture_px=decoded[0].width,
            decode_per_s=per_s(n, lambda: [images.decode(file) for file in files]),
            preprocess_per_s=per_s(n, lambda: [clf.bundle.preprocess(image) for image in decoded]),
            all_per_s=per_s(n, lambda: clf.predict(files)),
            eight_bits=tuple(
                EightBits(
                    mode=mode,
                    fp32_per_s=1e3 * n / float(np.median(times[f"{mode} fp32"])),
                    int8_per_s=1e3 * n / float(np.median(times[f"{mode} int8"])),
                    x_fp32=Ratio.of(times[f"{mode} int8"], times[f"{mode} fp32"]),
                    agreement=float((labels[f"{mode} int8"] == labels[f"{mode} fp32"]).mean()),
                )
                for mode in ("exact", "delta")
            ),
            first_answer_s=float(np.median([_first_answer_s(Path(folder) / "exact-fp32", first) for _ in range(5)])),
        )


def export_embedded(folder: Path, batch: int) -> dict[tuple[str, str], OnnxClassifier]:
    """Return the embedded model's bundles by mode and dtype: "delta" as it ships, calibrated; "exact" with TopK."""
    clf = RobustClassifier.from_pretrained(EMBEDDED, device="cpu")
    clip, shipped = clf.clip, clf.defense
    assert shipped is not None
    saes = [each.sae for each in checkpoint.shipped_saes(MODELS[EMBEDDED])]
    defenses: dict[Mode, Defense] = {"exact": restored(shipped, saes, own_rule=True), "delta": shipped}
    bundles = {}
    for mode, defense in defenses.items():
        detach(clip.model)
        robust = RobustClassifier(clip, defense).set_labels(list(OBJECTS))
        for dtype in _DTYPES:
            export_onnx(robust, folder / f"{mode}-{dtype}", mode=mode, dtype=dtype)
            bundles[str(mode), str(dtype)] = OnnxClassifier(folder / f"{mode}-{dtype}", batch_size=batch)
    return bundles


def _encode_all(clf: OnnxClassifier, chunks: Sequence[np.ndarray]) -> None:
    for chunk in chunks:
        clf.encode_pixels(chunk)


def _first_answer_s(bundle: Path, picture: Path) -> float:
    code = (
        "import sys, time; start = time.perf_counter()\n"
        "from defense.export.runtime import OnnxClassifier\n"
        "OnnxClassifier(sys.argv[1])(sys.argv[2]); print(time.perf_counter() - start)\n"
        "assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-P", "-c", code, str(bundle), str(picture)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
