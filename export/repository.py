"""What NVIDIA Triton reads: folders of models, each with a config.pbtxt.

    model_repository/clip_defense             pixel_values, strength -> image_embeds, logits_per_image
    model_repository/clip_defense_text        input_ids -> text_embeds, where the bundle has a text tower
    model_repository/clip_defense_graph       what clip_defense runs where a graph is Triton's own to run, and
    model_repository/clip_defense_strength    its step before: strength, 1 where a request has none
    picture_repository/clip_defense_decode    picture -> pixel_values, strength, error          (Python)
    picture_repository/clip_defense_answer    image_embeds, ... -> label, score, ...             (Python)
    picture_repository/clip_defense_pictures  the ensemble of decode, clip_defense and answer
    picture_repository/clip_defense_raw       the same with one input, for a file as the body of a request

The second repository is of its own: a server without this package's Python environment serves the first alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

REPOSITORY, PICTURE_REPOSITORY = "model_repository", "picture_repository"
VISION_NAME, TEXT_NAME = "clip_defense", "clip_defense_text"
GRAPH_NAME, STRENGTH_NAME = "clip_defense_graph", "clip_defense_strength"
DECODE_NAME, ANSWER_NAME = "clip_defense_decode", "clip_defense_answer"
PICTURES_NAME, RAW_NAME = "clip_defense_pictures", "clip_defense_raw"
STRENGTH = "strength"
_USED = f"{STRENGTH}_used"
MAX_BATCH = 32
WATCHED_SHARE = 0.05
"""Of the pictures, how many are asked about a second time without the defense, to see what it changes."""
_MAX_DELAY_US = 2000
# fp16 ends a CPU's process, and int8 was made for CPUs.
_INSTANCE_KIND = {"fp32": "KIND_AUTO", "fp16": "KIND_GPU", "int8": "KIND_CPU"}
_BUNDLE_FROM_VERSION = "../../.."


class _Tensor(NamedTuple):
    """An input or an output of a model; its dims leave the batch out."""

    name: str
    type: str
    dims: Sequence[int]
    is_optional: bool = False
    labels: str = ""
    is_scalar: bool = False
    """One number for each picture, where Triton would make it a row of one number for each."""

    def config(self) -> str:
        more = f', label_filename: "{self.labels}"' if self.labels else ""
        more += ", optional: true" if self.is_optional else ""
        dims = ", ".join(map(str, self.dims))
        more += ", reshape: { shape: [ ] }" if self.is_scalar else ""
        return f'  {{ name: "{self.name}", data_type: {self.type}, dims: [ {dims} ]{more} }}'

    def zeros(self) -> str:
        dims = ", ".join(map(str, self.dims))
        value = f"{{ data_type: {self.type}, dims: [ {dims} ], zero_data: true }}"
        return f'inputs {{ key: "{self.name}", value: {value} }}'


def place_graphs(folder: Path, fields: Mapping[str, Any], *, in_python: bool) -> dict[str, str]:
    """Move a bundle's graphs into its model repository, and return the manifest's fields that change: their paths.

    Args:
        folder: Of the bundle.
        fields: What its manifest says.
        in_python: Serve them by this package's runtime on a CPU, and not by Triton's ONNX Runtime backend.
    """
    name = _graph_name(fields, in_python=in_python)
    inputs, outputs = _vision_tensors(fields, is_optional=in_python)
    kind = "KIND_CPU" if in_python else _INSTANCE_KIND[fields["dtype"]]
    moved = {"model": _place(folder, fields["model"], name)}
    _write_config(folder / REPOSITORY / name, _graph_config(name, inputs, outputs, kind, in_python=in_python))
    (folder / REPOSITORY / name / "labels.txt").write_text(_lines(fields["labels"]), encoding="utf-8")
    if name == GRAPH_NAME:
        _require_strength(folder / moved["model"])
        _write_default_strength(folder / REPOSITORY, fields, outputs)
    if fields["text_model"] is not None:
        moved["text_model"] = _place(folder, fields["text_model"], TEXT_NAME)
        text = (
            [_Tensor("input_ids", "TYPE_INT64", [fields["context_length"]])],
            [_Tensor("text_embeds", "TYPE_FP32", [fields["d_embed"]])],
        )
        kind = "KIND_CPU" if in_python else _INSTANCE_KIND["fp32"]
        _write_config(folder / REPOSITORY / TEXT_NAME, _graph_config(TEXT_NAME, *text, kind, in_python=in_python))
    if in_python:
        _write_python_model(folder / REPOSITORY / VISION_NAME, "VisionModel")
        if fields["text_model"] is not None:
            _write_python_model(folder / REPOSITORY / TEXT_NAME, "TextModel")
    return moved


def write_picture_models(folder: Path, fields: Mapping[str, Any], *, in_python: bool) -> None:
    """Write the repository with the models around the graph, from pictures as files to labels; see `place_graphs`."""
    root = folder / PICTURE_REPOSITORY
    pixels = _pixels(fields)
    strength = [_Tensor(STRENGTH, "TYPE_FP32", [1])] if fields["defense"] is not None else []
    embeds = _Tensor("image_embeds", "TYPE_FP32", [fields["d_embed"]])
    picture, error = _Tensor("picture", "TYPE_STRING", [1]), _Tensor("error", "TYPE_STRING", [1])
    given = _Tensor(STRENGTH, "TYPE_FP32", [1], is_optional=True)
    labels = [
        _Tensor("labels", "TYPE_STRING", [-1], is_optional=True),
        _Tensor("text_embeds", "TYPE_FP32", [-1, fields["d_embed"]], is_optional=True),
    ]
    answers = [
        _Tensor("label", "TYPE_STRING", [1]),
        _Tensor("score", "TYPE_FP32", [1]),
        _Tensor("scores", "TYPE_FP32", [-1]),
        error,
    ]
    settings = {"bundle": _BUNDLE_FROM_VERSION}
    takes = [picture, given] if strength else [picture]
    _write_python_model(root / DECODE_NAME, "DecodeModel")
    _write_config(
        root / DECODE_NAME, _python_config(DECODE_NAME, takes, [pixels, *strength, error], settings, n_instances=2)
    )
    _write_python_model(root / ANSWER_NAME, "AnswerModel")
    watched = {**settings, "watched_share": str(WATCHED_SHARE)} if strength else settings
    _write_config(
        root / ANSWER_NAME, _python_config(ANSWER_NAME, [pixels, *strength, embeds, error, *labels], answers, watched)
    )
    graph = _graph_name(fields, in_python=in_python)
    for name, takes_of_it, labels_of_it in ((PICTURES_NAME, takes, labels), (RAW_NAME, [picture], [])):
        steps = _picture_steps(graph, takes_of_it, labels_of_it, [embeds, *answers], strength)
        _write_ensemble(root, name, [*takes_of_it, *labels_of_it], [embeds, *answers], steps)


def _graph_name(fields: Mapping[str, Any], *, in_python: bool) -> str:
    """Return which model runs the vision graph: one behind another where that has to give it a strength."""
    return VISION_NAME if fields["defense"] is None or in_python else GRAPH_NAME


def _pixels(fields: Mapping[str, Any]) -> _Tensor:
    return _Tensor("pixel_values", "TYPE_FP32", [3, *fields["preprocess"]["size"]])


def _vision_tensors(fields: Mapping[str, Any], *, is_optional: bool) -> tuple[list[_Tensor], list[_Tensor]]:
    """Return the inputs and outputs of the vision graph; `is_optional` says whether its strength is."""
    inputs = [_pixels(fields)]
    if fields["defense"] is not None:
        inputs.append(_Tensor(STRENGTH, "TYPE_FP32", [1], is_optional, is_scalar=True))
    outputs = [
        _Tensor("image_embeds", "TYPE_FP32", [fields["d_embed"]]),
        _Tensor("logits_per_image", "TYPE_FP32", [len(fields["labels"])], labels="labels.txt"),
    ]
    return inputs, outputs


def _require_strength(graph: Path) -> None:
    """Make the strength of a graph an input that has to be fed.

    Triton's ONNX Runtime backend knows no optional inputs where there are batches, and no others with a default.
    """
    import onnx

    model = onnx.load(graph, load_external_data=False)
    default = next(value for value in model.graph.initializer if value.name == STRENGTH)
    model.graph.initializer.remove(default)
    onnx.save(model, graph)


def _write_default_strength(root: Path, fields: Mapping[str, Any], outputs: Sequence[_Tensor]) -> None:
    """Write the ensemble that clients ask, and its step before the graph, which makes no batches and so has a default.

    Args:
        root: The model repository.
        fields: What the bundle's manifest says.
        outputs: Of the graph.
    """
    pixels = _pixels(fields)
    given, used = _Tensor(STRENGTH, "TYPE_FP32", [1], is_optional=True), _Tensor(_USED, "TYPE_FP32", [1])
    inputs, made = [[each._replace(dims=[-1, *each.dims]) for each in side] for side in ([pixels, given], [used])]
    config = _head(STRENGTH_NAME, 'backend: "onnxruntime"', inputs, made, max_batch=0)
    _write_config(root / STRENGTH_NAME, f"{config}instance_group [ {{ kind: KIND_CPU }} ]\n")
    (root / STRENGTH_NAME / "1").mkdir()
    _save_default_strength(root / STRENGTH_NAME / "1" / "model.onnx", pixels.dims)
    steps = [
        _Step(STRENGTH_NAME, {each.name: each.name for each in (pixels, given)}, {_USED: _USED}),
        _Step(GRAPH_NAME, {pixels.name: pixels.name, STRENGTH: _USED}, {each.name: each.name for each in outputs}),
    ]
    # An ensemble takes labels from the model that has them.
    _write_ensemble(root, VISION_NAME, [pixels, given], [each._replace(labels="") for each in outputs], steps)


def _save_default_strength(path: Path, dims: Sequence[int]) -> None:
    """Write the graph pixel_values [n, *dims], strength [n, 1] -> strength_used [n, 1], ones where none is fed."""
    import onnx
    from onnx import helper, numpy_helper

    def value(name: str, shape: Sequence[int | str]) -> Any:
        return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)

    nodes = [
        helper.make_node("Shape", ["pixel_values"], ["n"], end=1),
        helper.make_node("Concat", ["n", "one"], ["shape"], axis=0),
        helper.make_node("Expand", [STRENGTH, "shape"], [_USED]),
    ]
    constants: dict[str, np.ndarray] = {STRENGTH: np.ones((1, 1), np.float32), "one": np.ones(1, np.int64)}
    graph = helper.make_graph(
        nodes,
        STRENGTH_NAME,
        [value("pixel_values", ["n", *dims]), value(STRENGTH, ["n_strengths", 1])],
        [value(_USED, ["n", 1])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def _place(folder: Path, graph: str, name: str) -> str:
    """Move a graph, with its external data, into the repository; return its path in the folder."""
    version = folder / REPOSITORY / name / "1"
    version.mkdir(parents=True)
    for path in folder.glob(f"{graph}*"):
        # The external data keeps its name: the graph has it inside.
        shutil.move(path, version / ("model.onnx" if path.name == graph else path.name))
    return (version / "model.onnx").relative_to(folder).as_posix()


def _write_python_model(model: Path, kind: str) -> None:
    """Write model.py of a model that this package serves in Triton's Python backend."""
    (model / "1").mkdir(parents=True, exist_ok=True)
    (model / "1" / "model.py").write_text(
        f'"""Served in Triton\'s Python backend by clip-defense, which has to be installed there."""\n\n'
        f"from defense.export.serving.triton_models import {kind} as TritonPythonModel\n\n"
        f'__all__ = ["TritonPythonModel"]\n',
        encoding="utf-8",
    )


def _write_config(model: Path, config: str) -> None:
    model.mkdir(parents=True, exist_ok=True)
    (model / "config.pbtxt").write_text(config, encoding="utf-8")


def _graph_config(
    name: str, inputs: Sequence[_Tensor], outputs: Sequence[_Tensor], kind: str, *, in_python: bool
) -> str:
    """Return the configuration of a model that runs a graph."""
    warmup = ",\n".join(
        f'  {{ name: "batch of {batch}", batch_size: {batch}, {", ".join(each.zeros() for each in inputs)} }}'
        for batch in (1, MAX_BATCH)
    )
    settings = {"bundle": _BUNDLE_FROM_VERSION} if in_python else {}
    return f"""{_head(name, f'backend: "{"python" if in_python else "onnxruntime"}"', inputs, outputs)}\
instance_group [ {{ kind: {kind} }} ]
dynamic_batching {{ max_queue_delay_microseconds: {_MAX_DELAY_US} }}
{_parameters(settings)}model_warmup [
{warmup}
]
"""


def _python_config(
    name: str,
    inputs: Sequence[_Tensor],
    outputs: Sequence[_Tensor],
    settings: Mapping[str, str],
    *,
    n_instances: int = 1,
) -> str:
    """Return the configuration of a model in Python around the graph."""
    return f"""{_head(name, 'backend: "python"', inputs, outputs)}\
instance_group [ {{ kind: KIND_CPU, count: {n_instances} }} ]
{_parameters(settings)}"""


class _Step(NamedTuple):
    """A model that an ensemble runs, with its tensors' names in it and in the ensemble."""

    model: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]

    def config(self) -> str:
        maps = [
            f'      {kind}_map {{ key: "{key}" value: "{value}" }}\n'
            for kind, names in (("input", self.inputs), ("output", self.outputs))
            for key, value in names.items()
        ]
        return f'    {{\n      model_name: "{self.model}"\n      model_version: -1\n{"".join(maps)}    }}'


def _picture_steps(
    graph: str,
    inputs: Sequence[_Tensor],
    labels: Sequence[_Tensor],
    outputs: Sequence[_Tensor],
    strength: Sequence[_Tensor],
) -> list[_Step]:
    """Return what an ensemble of pictures runs: decode, the graph, answer.

    Args:
        graph: The model that runs it.
        inputs: What goes to the first step.
        labels: What goes to the last one besides.
        outputs: Of the second step the first, and of the last one the others.
        strength: The graph's strength, where it has one.
    """
    # What passes from step to step has a name of its own, for an ensemble has its inputs among the same names.
    used = {each.name: _USED for each in strength}
    embeds, *answers = outputs
    between = {"pixel_values": "pixel_values", "error": "unreadable"} | used
    named = {each.name: each.name for each in labels}
    return [
        _Step(DECODE_NAME, {each.name: each.name for each in inputs}, between),
        _Step(graph, {"pixel_values": "pixel_values"} | used, {embeds.name: embeds.name}),
        _Step(ANSWER_NAME, {**between, embeds.name: embeds.name, **named}, {each.name: each.name for each in answers}),
    ]


def _write_ensemble(
    root: Path, name: str, inputs: Sequence[_Tensor], outputs: Sequence[_Tensor], steps: Sequence[_Step]
) -> None:
    """Write an ensemble into a repository."""
    config = f"""{_head(name, 'platform: "ensemble"', inputs, outputs)}\
ensemble_scheduling {{
  step [
{",".join(step.config() for step in steps)}
  ]
}}
"""
    _write_config(root / name, config)
    (root / name / "1").mkdir()
    (root / name / "1" / "README.md").write_text(
        "An ensemble is its config.pbtxt; Triton wants this folder all the same.\n", encoding="utf-8"
    )


def _head(
    name: str, kind: str, inputs: Sequence[_Tensor], outputs: Sequence[_Tensor], *, max_batch: int = MAX_BATCH
) -> str:
    """Return what every configuration begins with."""
    return f"""name: "{name}"
{kind}
max_batch_size: {max_batch}
version_policy: {{ latest: {{ num_versions: 1 }} }}
input [
{_listed(inputs)}
]
output [
{_listed(outputs)}
]
"""


def _listed(tensors: Sequence[_Tensor]) -> str:
    return ",\n".join(each.config() for each in tensors)


def _parameters(settings: Mapping[str, str]) -> str:
    """Return settings that a model in Python reads, a line each."""
    return "".join(
        f"parameters {{ key: {json.dumps(key)} value: {{ string_value: {json.dumps(value)} }} }}\n"
        for key, value in settings.items()
    )


def _lines(labels: Sequence[str]) -> str:
    return "".join(f"{label}\n" for label in labels)
