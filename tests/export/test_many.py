"""Many pictures, some of them broken, through both runtimes: every answer in its place, and memory flat."""

from __future__ import annotations

import gc
import io
import tracemalloc

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from defense.errors import InvalidImageError
from defense.export.runtime import OnnxClassifier

N_KINDS = 10
_BROKEN_EVERY = 100
_BREAKS = (b"", b"<html>", b"\x89PNG\r\n\x1a\n")


def encoded(seed: int, format: str) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, format)
    return stream.getvalue()


KINDS = [encoded(seed, ("PNG", "JPEG", "WEBP", "BMP")[seed % 4]) for seed in range(N_KINDS)]


def is_broken(index: int) -> bool:
    return index % _BROKEN_EVERY == 37


def broken(index: int) -> bytes:
    """One of several ways to be no picture, half downloads among them."""
    whole = KINDS[index // _BROKEN_EVERY % N_KINDS]
    return (*_BREAKS, whole[: len(whole) // 2], whole[: len(whole) // 3] + bytes(2000))[index // _BROKEN_EVERY % 5]


def pictures(n: int):
    """Pictures of which the number decides what is on them; each is made when it is asked for."""
    for index in range(n):
        yield broken(index) if is_broken(index) else bytes(bytearray(KINDS[index % N_KINDS]))


@pytest.fixture(params=["torch", "onnx"])
def clf(request, tiny_classifier, tiny_bundle):
    return tiny_classifier if request.param == "torch" else OnnxClassifier(tiny_bundle)


@pytest.mark.parametrize("n", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_fault_43_many_pictures_stay_aligned_in_flat_memory(clf, n):
    want = clf([*KINDS])
    n_seen = n_broken = 0
    held = []
    tracemalloc.start()
    try:
        for index, answer in enumerate(clf.stream(pictures(n), on_error="return")):
            n_seen += 1
            n_broken += isinstance(answer, InvalidImageError)
            assert isinstance(answer, InvalidImageError) == is_broken(index)
            if not is_broken(index):
                got = {row["label"]: row["score"] for row in answer}
                assert got == pytest.approx({row["label"]: row["score"] for row in want[index % N_KINDS]}, abs=1e-4)
            if index % (n // 4) == n // 8:
                gc.collect()  # an error and the frames in its traceback hold each other
                held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert (n_seen, n_broken) == (n, n // _BROKEN_EVERY)
    assert max(held) < min(held) + 2**20, held
