"""What NVIDIA Triton reads: folders of models, each with a config.pbtxt.

    model_repository/clip_defense             pixel_values, strength -> image_embeds, logits_per_image
    model_repository/clip_defense_text        input_ids -> text_embeds, where the bundle has a text tower
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

REPOSITORY, PICTURE_REPOSITORY = "model_repository", "picture_repository"
VISION_NAME, TEXT_NAME = "clip_defense", "clip_defense_text"
DECODE_NAME, ANSWER_NAME = "clip_defense_decode", "clip_defense_answer"
PICTURES_NAME, RAW_NAME = "clip_defense_pictures", "clip_defense_raw"
STRENGTH = "strength"
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
    vision = _vision_tensors(fields, is_optional=in_python)
    kind = "KIND_CPU" if in_python else _INSTANCE_KIND[fields["dtype"]]
    moved = {"model": _place(folder, fields["model"], VISION_NAME)}
    _write_config(folder / REPOSITORY / VISION_NAME, _graph_config(VISION_NAME, *vision, kind, in_python=in_python))
    (folder / REPOSITORY / VISION_NAME / "labels.txt").write_text(_lines(fields["labels"]), encoding="utf-8")
    if fields["defense"] is not None and not in_python:
        _require_strength(folder / moved["model"])
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


def write_picture_models(folder: Path, fields: Mapping[str, Any]) -> None:
    """Write the repository with the models around the graph: from pictures as files to labels."""
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
    for name, takes_of_it, labels_of_it in ((PICTURES_NAME, takes, labels), (RAW_NAME, [picture], [])):
        ensemble = _ensemble_config(name, takes_of_it, labels_of_it, [embeds, *answers], strength)
        _write_config(root / name, ensemble)
        version = root / name / "1"
        version.mkdir()
        (version / "README.md").write_text("An ensemble is its config.pbtxt; Triton wants this folder all the same.\n")


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


def _ensemble_config(
    name: str,
    inputs: Sequence[_Tensor],
    labels: Sequence[_Tensor],
    outputs: Sequence[_Tensor],
    strength: Sequence[_Tensor],
) -> str:
    """Return the configuration of an ensemble: decode, clip_defense, answer.

    Args:
        name: Of the ensemble.
        inputs: What goes to the first step.
        labels: What goes to the last one besides.
        outputs: Of the second step the first, and of the last one the others.
        strength: The graph's strength, where it has one.
    """
    # What passes from step to step has a name of its own, for an ensemble has its inputs among the same names.
    used = {each.name: f"{each.name}_used" for each in strength}
    embeds, *answers = outputs
    steps = [
        (DECODE_NAME, {i.name: i.name for i in inputs}, {"pixel_values": "pixel_values", "error": "unreadable"} | used),
        (VISION_NAME, {"pixel_values": "pixel_values"} | used, {embeds.name: embeds.name}),
        (
            ANSWER_NAME,
            {"pixel_values": "pixel_values", embeds.name: embeds.name, "error": "unreadable"}
            | used
            | {each.name: each.name for each in labels},
            {each.name: each.name for each in answers},
        ),
    ]
    return f"""{_head(name, 'platform: "ensemble"', [*inputs, *labels], outputs)}\
ensemble_scheduling {{
  step [
{",".join(_step(*step) for step in steps)}
  ]
}}
"""


def _step(model: str, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> str:
    maps = [
        f'      {kind}_map {{ key: "{key}" value: "{value}" }}\n'
        for kind, names in (("input", inputs), ("output", outputs))
        for key, value in names.items()
    ]
    return f'    {{\n      model_name: "{model}"\n      model_version: -1\n{"".join(maps)}    }}'


def _head(name: str, kind: str, inputs: Sequence[_Tensor], outputs: Sequence[_Tensor]) -> str:
    """Return what every configuration begins with."""
    return f"""name: "{name}"
{kind}
max_batch_size: {MAX_BATCH}
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
