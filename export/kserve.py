"""A bundle behind KServe's own server, by its V2 protocol over REST and gRPC, without Triton.

    python -m defense.export.kserve BUNDLE --http_port 8080 --grpc_port 8081

Needs the extra `kserve`. It serves the models that a repository for Triton has: `clip_defense` takes
pixel_values, and `clip_defense_pictures` pictures as files, each with inputs and outputs of the same names; and
Prometheus' text at /metrics. It begins to listen when the golden embeddings were reproduced.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from defense.cli.common import exit_code
from defense.errors import BackendError, ConfigError, DefenseError, ShapeError, cannot_import
from defense.export.repository import MAX_BATCH, PICTURES_NAME, STRENGTH, VISION_NAME, WATCHED_SHARE
from defense.export.runtime import OnnxClassifier
from defense.export.serving import pictures
from defense.export.serving.watch import PrometheusMeter, Watch

try:
    import kserve
    from kserve.errors import InferenceError, InvalidInput
except ImportError as missing:
    error = cannot_import("kserve", missing)
    if __name__ == "__main__":  # a sentence, as from every command
        sys.stderr.write(f"error: {error}\n")
        sys.exit(exit_code(error))
    raise error from missing


class _Predictor(kserve.Model):  # type: ignore[misc]  # the SDK ships no types
    """What both models share: a thread for each request, and errors in KServe's own classes."""

    def __init__(self, name: str, clf: OnnxClassifier) -> None:
        super().__init__(name)
        self.clf = clf
        self.ready = True

    async def predict(self, payload: Any, _headers: Any = None, _response_headers: Any = None) -> Any:
        """Return KServe's `InferResponse` to its `InferRequest`.

        Raises:
            InvalidInput: The request cannot be answered.
            InferenceError: The runtime failed.
        """
        if not isinstance(payload, kserve.InferRequest):
            raise InvalidInput(f"{self.name} speaks the V2 protocol; send the request to /v2/models/{self.name}/infer")
        try:
            outputs = await asyncio.to_thread(self.answer, _Inputs(payload))
        except BackendError as error:
            raise InferenceError(str(error)) from error
        except DefenseError as error:
            raise InvalidInput(str(error)) from error
        return _response(self.name, payload, outputs)

    def answer(self, inputs: _Inputs) -> Mapping[str, np.ndarray]:
        """Return the outputs to the inputs of one request, by name."""
        raise NotImplementedError


class VisionPredictor(_Predictor):
    """`clip_defense`: pixel_values, strength -> image_embeds, logits_per_image."""

    def answer(self, inputs: _Inputs) -> Mapping[str, np.ndarray]:
        """Return what the graph makes of pixels."""
        pixel_values = inputs.array("pixel_values", "FP32", (3, *self.clf.preprocess.size))
        pictures.check_pixels(pixel_values)
        strengths = pictures.strengths_of(inputs.optional(STRENGTH, "FP32", (1,)), len(pixel_values))
        return dict(zip(("image_embeds", "logits_per_image"), self.clf.outputs(pixel_values, strengths), strict=True))


class PicturesPredictor(_Predictor):
    """`clip_defense_pictures`: pictures as files -> labels and scores, for the bundle's labels or the request's.

    Args:
        name: Of the model.
        clf: The bundle.
        watch: What counts the answers.
    """

    def __init__(self, name: str, clf: OnnxClassifier, watch: Watch) -> None:
        super().__init__(name, clf)
        self.watch = watch

    def answer(self, inputs: _Inputs) -> Mapping[str, np.ndarray]:
        """Return the answers to pictures; one that cannot be read has its error in its row."""
        files = inputs.array("picture", "BYTES", (1,)).reshape(-1)
        strengths = pictures.strengths_of(inputs.optional(STRENGTH, "FP32", (1,)), len(files))
        labels = inputs.optional("labels", "BYTES", (-1,))
        text_embeds = inputs.optional("text_embeds", "FP32", (-1, self.clf.bundle.text_embeds.shape[1]))
        choice = pictures.chosen_by(self.clf, labels, text_embeds)
        prepared = pictures.prepare(self.clf, list(files))
        image_embeds, _ = self.clf.outputs(prepared.pixel_values, strengths)
        answers = pictures.answer(self.clf, image_embeds, prepared.errors, choice)
        self.watch.add(prepared.pixel_values, strengths, image_embeds, answers.error, choice.text_embeds)
        self.watch.check_golden()
        return {"image_embeds": image_embeds, **pictures.outputs_of(answers)}


class _Inputs:
    """The inputs of a request, checked."""

    def __init__(self, request: Any) -> None:
        self._by_name = {each.name: each for each in request.inputs}

    def array(self, name: str, datatype: str, dims: tuple[int, ...]) -> np.ndarray:
        """Return an input that has to be there, [n, *dims], with -1 for any size.

        Raises:
            ConfigError: It is missing, of another type, or of too many or no pictures.
            ShapeError: It has another shape.
        """
        given = self._by_name.get(name)
        if given is None:
            raise ConfigError(f"the request has the inputs {sorted(self._by_name)}; send {name}")
        if given.datatype != datatype:
            raise ConfigError(f"{name} is {given.datatype}; send {datatype}")
        shape = list(given.shape)
        wanted = ", ".join("any" if size < 0 else str(size) for size in dims)
        if len(shape) != 1 + len(dims) or any(want not in (-1, got) for want, got in zip(dims, shape[1:], strict=True)):
            raise ShapeError(f"{name} is {shape}; send [pictures, {wanted}]")
        if not 1 <= shape[0] <= MAX_BATCH:
            raise ConfigError(f"the request has {shape[0]} pictures; send 1 to {MAX_BATCH} at a time")
        try:
            array = given.as_numpy()
        except (ValueError, TypeError, OverflowError) as error:
            raise ShapeError(f"{name} does not hold the data of a {datatype} tensor {shape}: {error}") from error
        if datatype != "BYTES":
            return np.asarray(array, np.float32)
        texts = [each.encode() if isinstance(each, str) else bytes(each) for each in array.reshape(-1)]
        return np.array([*texts, None], dtype=object)[:-1].reshape(shape)

    def optional(self, name: str, datatype: str, dims: tuple[int, ...]) -> np.ndarray | None:
        """Return an input as `array` does, or None where the request has none of that name."""
        return self.array(name, datatype, dims) if name in self._by_name else None


def _response(model: str, request: Any, outputs: Mapping[str, np.ndarray]) -> Any:
    is_binary = request.from_grpc or request.use_binary_outputs
    tensors = []
    for name, array in outputs.items():
        tensors.append(kserve.InferOutput(name, list(array.shape), "BYTES" if array.dtype == object else "FP32"))
        tensors[-1].set_data_from_numpy(array, binary_data=is_binary)
    return kserve.InferResponse(
        response_id=request.id or str(uuid.uuid4()),  # the SDK refuses to answer without one
        model_name=model,
        infer_outputs=tensors,
        requested_outputs=request.request_outputs,
        use_binary_outputs=request.use_binary_outputs,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal comes, and return the exit code: 2 where the bundle cannot be served."""
    parser = argparse.ArgumentParser(
        prog="python -m defense.export.kserve",
        description=__doc__.splitlines()[0],
        parents=[kserve.model_server.parser],
    )
    parser.add_argument("bundle", help="what `defense export` wrote, in any layout")
    parser.add_argument(
        "--watched_share",
        type=float,
        default=WATCHED_SHARE,
        help="of the pictures, how many are asked about again without the defense (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)
    try:
        clf = OnnxClassifier(arguments.bundle)
        clf.check_golden()
        watch = Watch(clf, PrometheusMeter(), arguments.watched_share)
    except DefenseError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    kserve.ModelServer().start([VisionPredictor(VISION_NAME, clf), PicturesPredictor(PICTURES_NAME, clf, watch)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
