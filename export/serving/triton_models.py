"""The models in Python of a model repository, as Triton's Python backend calls them; see repository.py.

Only that backend can import this module: `triton_python_backend_utils` is its own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import triton_python_backend_utils as pb_utils

from defense.errors import BackendError, CheckpointError, DefenseError
from defense.export import bundle
from defense.export.repository import MAX_BATCH, STRENGTH, TEXT_NAME, VISION_NAME
from defense.export.runtime import OnnxClassifier
from defense.export.serving import pictures
from defense.export.serving.watch import FIGURES, Watch
from defense.store.folders import Verify


class Model:
    """What all of them share: tensors that arrive whole, and to each request an answer, whatever becomes of others."""

    def initialize(self, args: Mapping[str, Any]) -> None:
        """Load what Triton's arguments name.

        Raises:
            BackendError: This numpy's arrays are not understood by the backend.
            CheckpointError, IntegrityError: The bundle cannot be used, or does not compute here what was exported.
        """
        _check_numpy()
        self.load(args)

    def load(self, args: Mapping[str, Any]) -> None:
        """Load the bundle that Triton's arguments name."""
        raise NotImplementedError

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Return a response to each request."""
        return [_response(partial(self.answer, request)) for request in requests]

    def answer(self, request: Any) -> dict[str, np.ndarray]:
        """Return the outputs to one request, by name."""
        raise NotImplementedError


class VisionModel(Model):
    """`clip_defense` on a CPU: pixel_values, strength -> image_embeds, logits_per_image.

    It is ready when the golden embeddings were reproduced.
    """

    def load(self, args: Mapping[str, Any]) -> None:
        """Load the bundle, and reproduce its golden embeddings."""
        self.clf = _Local(*_bundle_of(args, "sha256"))
        self.clf.check_golden()

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Return a response to each request; those that can be answered go through the graph together."""
        responses: list[Any] = [None] * len(requests)
        checked: list[tuple[int, np.ndarray, np.ndarray]] = []
        for index, request in enumerate(requests):
            try:
                checked.append((index, *self._checked(request)))
            except DefenseError as error:
                responses[index] = _refusal(error)
        if checked:
            self._answer(checked, responses)
        return responses

    def _checked(self, request: Any) -> tuple[np.ndarray, np.ndarray]:
        pixel_values = _input(request, "pixel_values")
        pictures.check_pixels(pixel_values)
        return pixel_values, pictures.strengths_of(_optional(request, STRENGTH), len(pixel_values))

    def _answer(self, checked: Sequence[tuple[int, np.ndarray, np.ndarray]], responses: list[Any]) -> None:
        """Fill in the responses to requests that were found good: their index, pixel_values and strengths."""
        try:
            outputs = self.clf.outputs(*(np.concatenate(parts) for parts in list(zip(*checked, strict=True))[1:]))
        except DefenseError as error:
            for index, *_ in checked:
                responses[index] = _refusal(error)
            return
        start = 0
        for index, pixel_values, _ in checked:
            rows = slice(start, start := start + len(pixel_values))
            embeds, logits = (values[rows] for values in outputs)
            responses[index] = _response(partial(dict, image_embeds=embeds, logits_per_image=logits))


class TextModel(Model):
    """`clip_defense_text` on a CPU: input_ids -> text_embeds, not normalized."""

    def load(self, args: Mapping[str, Any]) -> None:
        """Load the bundle."""
        self.clf = _Local(*_bundle_of(args, "size"))

    def answer(self, request: Any) -> dict[str, np.ndarray]:
        """Return embeddings of texts."""
        return {"text_embeds": self.clf.encode_text(_input(request, "input_ids"))}


class DecodeModel(Model):
    """`clip_defense_decode`: encoded pictures -> pixel_values, and an error for each that cannot be read."""

    def load(self, args: Mapping[str, Any]) -> None:
        """Load the bundle."""
        self.clf = _Remote(*_bundle_of(args, "size"))

    def answer(self, request: Any) -> dict[str, np.ndarray]:
        """Return the pictures of a request as the graph reads them."""
        files = _input(request, "picture").reshape(-1)
        prepared = pictures.prepare(self.clf, list(files))
        strengths = pictures.strengths_of(_optional(request, STRENGTH), len(files))
        outputs = {"pixel_values": prepared.pixel_values, "error": pictures.encoded(prepared.errors)}
        return outputs | ({STRENGTH: strengths[:, None]} if self.clf.has_strength else {})


class AnswerModel(Model):
    """`clip_defense_answer`: image_embeds -> labels and scores, for the labels of the bundle or of the request."""

    def load(self, args: Mapping[str, Any]) -> None:
        """Load the bundle, and begin to count."""
        self.clf = _Remote(*_bundle_of(args, "size"))
        self.watch = Watch(self.clf, _Metrics(), float(_setting(args, "watched_share", "0")))

    def answer(self, request: Any) -> dict[str, np.ndarray]:
        """Return the answers to a request whose pictures went through the graph."""
        choice = pictures.chosen_by(self.clf, _optional(request, "labels"), _optional(request, "text_embeds"))
        embeds = _input(request, "image_embeds")
        errors = np.array([text.decode() for text in _input(request, "error").reshape(-1)], dtype=object)
        answers = pictures.answer(self.clf, embeds, errors, choice)
        strengths = pictures.strengths_of(_optional(request, STRENGTH), len(embeds))
        self.watch.add(_input(request, "pixel_values"), strengths, embeds, answers.error, choice.text_embeds)
        self.watch.check_golden()
        return pictures.outputs_of(answers)


# --- bundles, and the graphs that other models of the server run ------------------------------------------------------


def _bundle_of(args: Mapping[str, Any], verify: Verify) -> tuple[bundle.Bundle, Verify]:
    """Return the bundle in which the repository lies, as the setting "bundle" says from the folder of the version.

    Only the files that are read are checked: Python has just put a __pycache__ beside model.py, for one.
    """
    version = Path(args["model_repository"]) / args["model_version"]
    folder = (version / _setting(args, "bundle", "")).resolve()
    if not bundle.is_bundle(folder):
        raise CheckpointError(
            f"{folder} is no bundle; serve the repository from within the folder that `defense export` wrote, or set "
            f'the parameter "bundle" in the config.pbtxt of {args["model_name"]} to that folder'
        )
    return bundle.load(folder, verify=verify, is_served=True), verify


def _setting(args: Mapping[str, Any], name: str, default: str) -> str:
    parameters = json.loads(args["model_config"]).get("parameters", {})
    return str(parameters.get(name, {}).get("string_value", default))


class _Local(OnnxClassifier):
    """A classifier of a bundle that was loaded already."""

    def __init__(self, loaded: bundle.Bundle, verify: Verify) -> None:
        self._loaded = loaded
        super().__init__(loaded.folder, verify=verify, providers=["CPUExecutionProvider"])

    def _load(self) -> bundle.Bundle:
        return self._loaded


class _Remote(_Local):
    """The same with its graphs in other models of the server."""

    def _session(self, name: str) -> Any:
        if name == self.bundle.model:
            outputs, strength = VISION_NAME, [_Value(STRENGTH, (MAX_BATCH,))] if self.bundle.defense else []
            return _RemoteSession(outputs, strength)
        return _RemoteSession(TEXT_NAME, [])


class _Value(NamedTuple):
    """An input of a graph, as ONNX Runtime describes it."""

    name: str
    shape: tuple[int, ...]


class _RemoteSession:
    """A model of the server, called as a session of ONNX Runtime is."""

    def __init__(self, model: str, strength: list[_Value]) -> None:
        self.model, self.strength = model, strength

    def get_inputs(self) -> list[_Value]:
        """Return the graph's strength, where it has one: it is always fed."""
        return self.strength

    def get_overridable_initializers(self) -> list[_Value]:
        """Return none."""
        return []

    def run(self, names: list[str], feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Return outputs, asking for as many rows at once as the model takes."""
        n = len(next(iter(feed.values())))
        parts = list(self._parts(names, feed, n))
        return [np.concatenate(rows) for rows in zip(*parts, strict=True)]

    def _parts(self, names: list[str], feed: Mapping[str, np.ndarray], n: int) -> Iterator[list[np.ndarray]]:
        for start in range(0, n, MAX_BATCH):
            rows = {name: np.ascontiguousarray(array[start : start + MAX_BATCH]) for name, array in feed.items()}
            inputs = [
                pb_utils.Tensor(name, array[:, None] if name == STRENGTH else array) for name, array in rows.items()
            ]
            response = pb_utils.InferenceRequest(
                model_name=self.model, requested_output_names=names, inputs=inputs
            ).exec()
            if response.has_error():
                raise BackendError(f"{self.model}: {response.error().message()}")
            yield [pb_utils.get_output_tensor_by_name(response, name).as_numpy() for name in names]


class _Metrics:
    """Triton's metrics; see `watch.Meter`."""

    def __init__(self) -> None:
        kinds = {"counter": pb_utils.MetricFamily.COUNTER, "gauge": pb_utils.MetricFamily.GAUGE}
        self._families = {
            name: pb_utils.MetricFamily(name=name, description=figure.help, kind=kinds[figure.kind])
            for name, figure in FIGURES.items()
        }
        self._metrics = {name: family.Metric(labels={}) for name, family in self._families.items()}

    def add(self, name: str, amount: float) -> None:
        """Raise a counter."""
        self._metrics[name].increment(amount)

    def set(self, name: str, value: float) -> None:
        """Set a gauge."""
        self._metrics[name].set(value)


# --- tensors ----------------------------------------------------------------------------------------------------------


def _check_numpy() -> None:
    """Raise `BackendError` where the backend takes arrays of this numpy for others than they are.

    The backend of Triton up to 2.51 was built for numpy 1. Of numpy 2 it takes the size of an element for 0: each pixel
    of a request is then its first one, and outputs are empty. The way there and back shows that without a request.
    """
    sent = np.arange(1, 4, dtype=np.float32)
    there = pb_utils.Tensor("sent", sent).to_dlpack()
    back = pb_utils.Tensor.from_dlpack("back", there).as_numpy()
    if not np.array_equal(back, sent):
        raise BackendError(
            f"this Triton's Python backend cannot read arrays of numpy {np.__version__} in {sys.prefix}: {sent} came "
            f"back as {back}; install numpy<2 there, as the bundle's requirements.txt has it, or serve by Triton 2.52 "
            "(24.11) or newer"
        )


def _response(outputs: Callable[[], Mapping[str, np.ndarray]]) -> Any:
    """Return a response with what a function returns, or with the error that it raises."""
    try:
        tensors = [pb_utils.Tensor(name, np.ascontiguousarray(array)) for name, array in outputs().items()]
        return pb_utils.InferenceResponse(output_tensors=tensors)
    except DefenseError as error:
        return _refusal(error)


def _refusal(error: DefenseError) -> Any:
    code = pb_utils.TritonError.INTERNAL if isinstance(error, BackendError) else pb_utils.TritonError.INVALID_ARG
    return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(str(error), code))


def _input(request: Any, name: str) -> np.ndarray:
    array: np.ndarray = pb_utils.get_input_tensor_by_name(request, name).as_numpy()
    return array


def _optional(request: Any, name: str) -> np.ndarray | None:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy()
