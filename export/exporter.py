"""From a `RobustClassifier` to a bundle: trace, write, verify, and only then give the folder its name."""

from __future__ import annotations

import copy
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import save_file

from defense.classify.classifier import RobustClassifier
from defense.classify.inputs import batched
from defense.core.suppress import Suppressor
from defense.data import images
from defense.errors import ConfigError
from defense.export import bundle, readme
from defense.export.layouts import Dtype, Layout, Mode, arrange
from defense.export.manifest import check_logit_scale
from defense.export.repository import STRENGTH
from defense.export.sessions import HALF_OPTIONS, check_path
from defense.export.text import TextGraph, trace_text
from defense.export.verify import BATCHES, N_ROWS, PLAIN, Batch, Expected, Parity, Tolerance, verify
from defense.export.vision import VisionGraph, silent_bias, silent_biases, trace_vision, write
from defense.hosts.attach import attached, is_wrapped
from defense.hosts.clip import embedded_folder
from defense.hosts.families import tower_of
from defense.store import folders
from defense.store.defenses import MANIFEST
from defense.world.draws import typographic
from defense.world.scenes import render

MODEL, TEXT_MODEL = "model.onnx", "text.onnx"
TOLERANCES: dict[str, Tolerance] = {
    "fp32": Tolerance(atol=1e-5, cosine=0.99999, agreement=1.0),
    "fp16": Tolerance(atol=0.02, cosine=0.999, agreement=0.95),
    "int8": Tolerance(atol=0.05, cosine=0.99, agreement=0.99, tie=0.01),
}
"""How far a graph of each dtype may be from torch.

int8 has a tie: on a picture that shows none of the labels several of them score alike, and rounding decides which wins.
"""


_N_DRAWN = 200
"""How many pictures a graph in fp16 or int8 is compared on; each of them is 0.5 % of the agreement."""
_GOLDEN_PICTURES = 3
_N_FEW = 2
"""How many pictures a graph is run on with every latent silent, and with a strength for each of them."""


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        folder: The bundle, as it was asked for.
        manifest_sha256: Of its manifest, which lists the hash of every other file: it names this bundle and no other.
        mode: How the defense is written in the graph.
        dtype: Of the vision graph.
        model_bytes: Size of the vision graph, with weights that lie in a file beside it.
        parity: The vision graph's answers against torch's.
        text_parity: The text graph's; None without one.
    """

    folder: Path
    manifest_sha256: str
    mode: Mode
    dtype: Dtype
    model_bytes: int
    parity: Parity
    text_parity: Parity | None


def export_onnx(
    clf: RobustClassifier,
    folder: str | os.PathLike[str],
    *,
    mode: Mode = "exact",
    dtype: Dtype = "fp32",
    text: bool = False,
    layout: Layout = "bundle",
    tell: Callable[[str], None] = lambda _stage: None,
) -> ExportReport:
    """Write a classifier and its labels as a bundle, and return what was written and how it was verified.

    The folder appears under its name when everything in it was verified, and not at all otherwise.

    Args:
        clf: On the CPU, in float32, with labels set.
        folder: Where to; it must not exist, or be empty. Its parent must exist.
        mode: How the rule of a TopK SAE is written; see the table in vision.py.
        dtype: "fp32"; "fp16", for CUDA; or "int8", for CPUs (see int8.py).
        text: Add the text tower, so that labels can be chosen at run time.
        layout: "bundle", or the files of a server around the same; see layouts.py.
        tell: Called at the start of each stage with what it is, in a few words.

    Raises:
        ConfigError: An argument that cannot work, no labels, or a folder with something in it.
        ParityError: The graph answers otherwise than torch.
        ExportError: ONNX Runtime refuses the graph, or dies of it.
    """
    target = free_target(folder)
    tell("embedding the labels")
    _check(clf, dtype, layout)
    graph, text_graph = VisionGraph(_tower(clf, dtype), mode), TextGraph(clf) if text else None
    with folders.publishing(target, read=bundle.load) as staging:
        parity = _write_vision(staging, clf, graph, mode, dtype, tell)
        text_parity = None if text_graph is None else _write_text(staging, clf, text_graph, tell)
        tell("writing and reading back the rest")
        folders.write_tensors(_labels(clf, with_tokens=text), staging / bundle.LABELS, save_file)
        folders.write_tensors(_golden(clf), staging / bundle.GOLDEN, save_file)
        fields = _fields(clf, mode, dtype, text_graph, parity)
        fields |= arrange(staging, layout, fields)
        (staging / bundle.README).write_text(readme.render(fields, layout, staging), encoding="utf-8")
        (staging / bundle.LICENSES).write_text(readme.licenses(fields), encoding="utf-8")
        bundle.write_manifest(staging, fields)
    model = target / fields["model"]
    return ExportReport(
        folder=Path(folder),
        manifest_sha256=folders.sha256_of(target / MANIFEST),
        mode=mode,
        dtype=dtype,
        model_bytes=sum(path.stat().st_size for path in model.parent.glob(f"{MODEL}*")),
        parity=parity,
        text_parity=text_parity,
    )


def free_target(folder: str | os.PathLike[str]) -> Path:
    """Return the absolute path of a folder that is not there yet, or empty.

    Raises:
        ConfigError: There is something in it, its parent is not there, or see `check_path`.
        OSError: See `folders.check_writable`.
    """
    target = folders.led_to(folder)
    check_path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists and is not an empty folder; choose another, or remove it first")
    if not target.parent.is_dir():
        raise ConfigError(f"there is no folder {target.parent} to put {target.name} into; make it first")
    folders.check_writable(target.parent)
    return target


def _check(clf: RobustClassifier, dtype: Dtype, layout: Layout) -> None:
    """Raise `ConfigError` where a classifier cannot be exported, or not in this way."""
    if dtype not in get_args(Dtype):
        raise ConfigError(f"dtype={dtype!r}; it must be one of {', '.join(get_args(Dtype))}")
    if layout not in get_args(Layout):
        raise ConfigError(f"layout={layout!r}; it must be one of {', '.join(get_args(Layout))}")
    if layout == "triton-python" and dtype == "fp16":
        raise ConfigError("layout='triton-python' runs on a CPU, and fp16 is for CUDA; take layout='triton', or int8")
    clf.text_embeds()  # raises where no labels are set
    check_logit_scale(clf.clip.logit_scale)
    for parameter in clf.clip.model.parameters():
        if parameter.device.type != "cpu" or parameter.dtype != torch.float32:
            raise ConfigError(
                f"the model is {parameter.dtype} on {parameter.device}; load it with device='cpu', in float32"
            )


def _tower(clf: RobustClassifier, dtype: Dtype) -> Any:
    """Return the model to trace: the classifier's own, or a copy whose vision tower is in half precision."""
    if dtype != "fp16":
        return clf.clip.model
    model = copy.deepcopy(clf.clip.model)
    for part in tower_of(model).parts:
        part.half()
    return model


def _write_vision(
    folder: Path, clf: RobustClassifier, graph: VisionGraph, mode: Mode, dtype: Dtype, tell: Callable[[str], None]
) -> Parity:
    """Write the vision graph into a folder, and return how it differs from torch.

    Raises:
        ParityError, ExportError: See `verify`.
    """
    tell("tracing the vision tower")
    model = trace_vision(graph, clf.clip.preprocess.size, torch.from_numpy(clf.text_embeds()))
    metadata = _metadata(clf, mode, dtype)
    if dtype == "int8":
        from defense.export.int8 import quantize

        tell("quantizing its linear layers")
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            write(model, Path(aside) / MODEL, metadata)
            quantize(Path(aside) / MODEL, folder / MODEL)
    else:
        write(model, folder / MODEL, metadata)
    options = HALF_OPTIONS if dtype == "fp16" else {}
    tell("asking PyTorch for the answers")
    expected = _expected_of_vision(clf, graph, dtype)
    tell(f"comparing the graph's on {expected.n_rows} pictures")
    return verify(folder / MODEL, expected, TOLERANCES[dtype], options)


def _write_text(folder: Path, clf: RobustClassifier, graph: TextGraph, tell: Callable[[str], None]) -> Parity:
    """Write the text graph into a folder, and return how it differs from torch.

    Raises:
        ParityError, ExportError: See `verify`.
    """
    tell("tracing the text tower")
    write(trace_text(graph), folder / TEXT_MODEL, {})
    tell("comparing its answers with PyTorch's")
    return verify(folder / TEXT_MODEL, _expected_of_text(clf, graph), TOLERANCES["fp32"])


def _labels(clf: RobustClassifier, *, with_tokens: bool) -> dict[str, np.ndarray]:
    """Return the labels' embeddings; for labels chosen later also which tokens the text tower does not know."""
    tensors = {"text_embeds": clf.text_embeds()}
    is_blank = clf.clip.blank_tokens() if with_tokens else None
    return tensors if is_blank is None else {**tensors, bundle.BLANK_TOKENS: is_blank}


def _metadata(clf: RobustClassifier, mode: Mode, dtype: Dtype) -> dict[str, str]:
    """Return what is written into the graph's own file, for whoever finds it without its bundle."""
    assert clf.prompts is not None
    return {
        "labels": json.dumps(clf.prompts.labels, ensure_ascii=False),
        "templates": json.dumps(clf.prompts.templates, ensure_ascii=False),
        "preprocess": json.dumps(clf.clip.preprocess.to_dict()),
        "defense": json.dumps(None if clf.defense is None else bundle.describe_defense(clf.defense)),
        "mode": mode,
        "dtype": dtype,
    }


def _fields(
    clf: RobustClassifier, mode: Mode, dtype: Dtype, text_graph: TextGraph | None, parity: Parity
) -> dict[str, Any]:
    """Return what the manifest says, but for the hashes of the files; the graphs lie as in the layout "bundle"."""
    assert clf.prompts is not None
    defense = clf.defense
    return {
        "host": asdict(defense.clip) if defense else {"sha256": clf.clip.tower.fingerprint()},
        "defense": None if defense is None else bundle.describe_defense(defense),
        "preprocess": clf.clip.preprocess.to_dict(),
        "labels": list(clf.prompts.labels),
        "templates": list(clf.prompts.templates),
        "context_length": None if text_graph is None else text_graph.context_length,
        "d_embed": clf.text_embeds().shape[1],
        "logit_scale": clf.clip.logit_scale,
        "model": MODEL,
        "text_model": None if text_graph is None else TEXT_MODEL,
        "mode": mode,
        "dtype": dtype,
        "tolerance": asdict(TOLERANCES[dtype]),
        "parity": asdict(parity),
        "licence": defense.license if defense is not None else "none: no defense inside",
    }


def _pictures(clf: RobustClassifier, dtype: Dtype) -> np.ndarray:
    """Return pixel_values [n, 3, height, width] of the pictures that a graph of this dtype is compared on.

    For fp32 `N_ROWS`, real pictures and noise by turns. fp16 and int8 round, which may change a label that is chance,
    as that of noise: for them `_N_DRAWN` drawn pictures.
    """
    preprocess = clf.clip.preprocess
    if dtype != "fp32":
        return np.stack([preprocess(render(each.scene)) for each in typographic(_N_DRAWN, seed=0)])
    rng = np.random.default_rng(0)
    real = [preprocess(images.decode(path).image) for path in sorted(embedded_folder("examples").glob("*.png"))]
    rows = rng.normal(size=(N_ROWS, 3, *preprocess.size)).astype(np.float32)
    for row in range(0, N_ROWS, 2):
        shift = tuple(rng.integers(-8, 9, 2))  # so that no two are the same
        rows[row] = np.roll(real[row // 2 % len(real)], shift, axis=(1, 2))
    return rows


def _expected_of_vision(clf: RobustClassifier, graph: VisionGraph, dtype: Dtype) -> Expected:
    """Return what the vision graph must answer: pictures with torch's embeddings and logits."""
    pixel_values = _pictures(clf, dtype)
    outputs = _answers(clf, pixel_values)
    image_embeds = outputs["image_embeds"]
    return Expected(
        inputs={"pixel_values": pixel_values},
        input_axes={"pixel_values": ["batch", 3, *clf.clip.preprocess.size]},
        outputs=outputs,
        output_axes={
            "image_embeds": ["batch", image_embeds.shape[1]],
            "logits_per_image": ["batch", "n_labels"],
        },
        logits="logits_per_image",
        logit_scale=clf.clip.model.logit_scale.detach().exp().item(),
        further=_further_batches(clf, graph, pixel_values),
    )


def _answers(clf: RobustClassifier, pixel_values: np.ndarray) -> dict[str, np.ndarray]:
    """Return torch's answers to pixel_values [n, 3, height, width], by the names of the graph's outputs."""
    image_embeds = np.concatenate([clf.encode_pixels(np.stack(rows)) for rows in batched(pixel_values, BATCHES[-1])])
    logits = clf.clip.logit_scale * image_embeds @ clf.text_embeds().T + clf.clip.logit_bias
    return {"image_embeds": image_embeds, "logits_per_image": logits.astype(np.float32)}


def _further_batches(clf: RobustClassifier, graph: VisionGraph, pixel_values: np.ndarray) -> dict[str, Batch]:
    """Return an empty batch; and with a defense one at strength 0, one of two strengths, and one where S is silent.

    Pictures from which a defense takes nothing may be hard to find: so biases stand in that keep every latent silent,
    in the graph as in torch.
    """
    n_labels, d_embed = clf.text_embeds().shape
    shapes = {"image_embeds": (0, d_embed), "logits_per_image": (0, n_labels)}
    nothing = {name: np.empty(shape, np.float32) for name, shape in shapes.items()}
    further = {"empty": Batch({"pixel_values": pixel_values[:0]}, nothing)}
    if not is_wrapped(clf.clip.model):
        return further
    defense = attached(clf.clip.model)
    with defense.bypassed():
        plain = _answers(clf, pixel_values)
    further[PLAIN] = Batch({"pixel_values": pixel_values, STRENGTH: np.zeros(1, np.float32)}, plain)
    few = pixel_values[:_N_FEW]
    # A server puts requests that differ in strength into one batch: here the first is plain, and the second is not.
    mixed = {name: np.concatenate([plain[name][:1], rows[1:]]) for name, rows in _answers(clf, few).items()}
    further["mixed"] = Batch({"pixel_values": few, STRENGTH: np.arange(_N_FEW, dtype=np.float32)}, mixed)
    with _silenced(defense.suppressors()):
        further["quiet"] = Batch({"pixel_values": few}, _answers(clf, few), silent_biases(graph))
    return further


@contextmanager
def _silenced(suppressors: Sequence[Suppressor]) -> Iterator[None]:
    """Keep the latents of suppressors from firing for as long as the context lasts."""
    before = [suppressor.b_S.clone() for suppressor in suppressors]
    try:
        for suppressor in suppressors:
            suppressor.b_S.copy_(silent_bias(suppressor))
        yield
    finally:
        for suppressor, bias in zip(suppressors, before, strict=True):
            suppressor.b_S.copy_(bias)


def _expected_of_text(clf: RobustClassifier, graph: TextGraph) -> Expected:
    """Return what the text graph must answer: `N_ROWS` texts, made of the labels, with torch's embeddings."""
    assert clf.prompts is not None
    texts = [f"{label} {i}" for i in range(math.ceil(N_ROWS / len(clf.prompts.labels))) for label in clf.prompts.labels]
    input_ids = np.asarray(clf.clip.tokenizer(texts[:N_ROWS]))
    embeds = clf.encode_text(input_ids)
    text_embeds = embeds / np.linalg.norm(embeds, axis=1, keepdims=True)
    return Expected(
        inputs={"input_ids": input_ids},
        input_axes={"input_ids": ["n_texts", graph.context_length]},
        outputs={"text_embeds": text_embeds},
        output_axes={"text_embeds": ["n_texts", text_embeds.shape[1]]},
    )


def _golden(clf: RobustClassifier) -> dict[str, np.ndarray]:
    """Return pictures uint8 [n, height, width, 3] with torch's image_embeds, by which a bundle is checked later."""
    if clf.defense is not None and clf.defense.golden is not None:
        pictures = clf.defense.golden.pictures
    else:
        height, width = clf.clip.preprocess.size
        pictures = np.random.default_rng(0).integers(0, 256, (_GOLDEN_PICTURES, height, width, 3), dtype=np.uint8)
    pixel_values = np.stack([clf.clip.preprocess(Image.fromarray(picture)) for picture in pictures])
    return {"pictures": np.ascontiguousarray(pictures), "image_embeds": clf.encode_pixels(pixel_values)}
