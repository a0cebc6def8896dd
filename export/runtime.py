"""A bundle behind the calls of `ZeroShotClassifier`, with ONNX Runtime and without torch.

image  --images.decode, Preprocess, in a thread pool-->  pixel_values [batch, 3, height, width]
       --model.onnx, at a strength-->                    image_embeds [batch, d_embed], normalized
labels --text.onnx, or baked in-->                       text_embeds [n_labels, d_embed], normalized
       --logit_scale * cos, softmax-->                   scores [batch, n_labels]
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from defense.classify.answers import Chunk, OnError, Pixels
from defense.classify.label_warnings import some, warn_of_reading, warn_of_unknown_words
from defense.classify.zeroshot import ZeroShotClassifier
from defense.data import labels
from defense.data.images import DEFAULT_LIMITS, Limits
from defense.data.labels import Prompts
from defense.data.locks import fork_safe_lock
from defense.data.preprocess import Preprocess
from defense.data.threads import decoding_threads
from defense.data.tokenizer import ClipTokenizer
from defense.errors import BackendError, CheckpointError, ConfigError, DefenseError, ShapeError
from defense.export import bundle
from defense.export import strength as strengths_of
from defense.export.repository import STRENGTH
from defense.export.sessions import CPU, CUDA, HALF_OPTIONS, import_onnxruntime, open_session
from defense.store.folders import Verify

log = logging.getLogger(__name__)

_TOPK_TAKES_NO_ROWS = (1, 31)
_N_SHOWN = 10
_left_behind: list[Any] = []
"""Sessions and thread pools of a parent process, kept so that they are never ended here: see `_start`."""


class OnnxClassifier(ZeroShotClassifier):
    """A zero-shot classifier out of a bundle.

    Safe to use from several threads. It can be pickled and survives a fork: what cannot be copied is built anew on
    first use.

    Args:
        source: The bundle's folder.
        providers: Execution providers, best first, all of which must start. None takes CUDA where it works, else the
            CPU.
        session_options: Attributes of `onnxruntime.SessionOptions`, e.g. {"intra_op_num_threads": 2}. By default as
            many threads as this process may use cores.
        batch_size: Pictures decoded and encoded at once.
        verify: "sha256" checks every byte of the bundle; "size" only the sizes.
        strength: Factor on what the defense removes, in [0, 1]. 0 switches it off: the answers are those of the CLIP
            without its defense, as near as `bundle.parity["plain_diff"]` says.
        limits: What pictures are accepted.

    Attributes:
        bundle: What is in the folder.

    Raises:
        CheckpointError, IntegrityError: The bundle cannot be used.
        ConfigError: `strength` lies outside [0, 1]; or it is not 1, and the graph has no such input.
        BackendError: A provider does not start, or a fp16 graph is to run on the CPU.
        MissingDependencyError: onnxruntime is not installed.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        *,
        providers: Sequence[str] | None = None,
        session_options: Mapping[str, Any] | None = None,
        batch_size: int = 32,
        verify: Verify = "sha256",
        strength: float = 1.0,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self.source, self.verify = source, verify
        self.bundle = self._load()
        super().__init__(batch_size, self.bundle.prompts, limits)
        self.providers = None if providers is None else tuple(providers)
        self.session_options = dict(session_options or {})
        self.strength = strengths_of.checked(strength)
        self._given = {self.bundle.prompts: self.bundle.text_embeds}  # not to be had from a text tower
        self._start()
        self._check_strength()
        warn_of_reading(self.bundle.prompts.labels, self.bundle.set_names if strength else ())

    def _load(self) -> bundle.Bundle:
        return bundle.load(self.source, verify=self.verify)

    def with_strength(self, strength: float) -> OnnxClassifier:
        """Return a classifier with the same graphs, labels and embeddings that differs in its strength alone.

        For shadow runs: `clf.with_strength(0)` beside `clf` takes no second session. Labels that are set on one of them
        later are not set on the other.

        Raises:
            ConfigError: See the class.
        """
        self._own_process()
        other = object.__new__(type(self))
        other.__dict__.update(vars(self))
        other.strength = strengths_of.checked(strength)
        other._check_strength()
        return other

    @property
    def has_strength(self) -> bool:
        """Whether the graph has a strength to set; one without a defense, or of an older version, has none."""
        self._own_process()
        return strengths_of.input_of(self._session(self.bundle.model)) is not None

    def _check_strength(self) -> None:
        if self.strength != 1 and not self.has_strength:
            raise ConfigError(
                f"strength={self.strength:g}, but the graph in {self.bundle.folder} has no strength: "
                + (
                    "there is no defense inside"
                    if self.bundle.defense is None
                    else "export the defense again to get one"
                )
            )

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], **options: Any) -> OnnxClassifier:
        """Return the classifier of a bundle; `options` are those of the class."""
        return cls(source, **options)

    def _start(self) -> None:
        """Build what cannot be copied to another process."""
        # Of a forked process: ending a session would wait for its threads, which stayed in the parent.
        _left_behind.append((vars(self).get("_sessions"), vars(self).get("_pool")))
        self._pid = os.getpid()
        self._lock = fork_safe_lock()
        self._pool: ThreadPoolExecutor | None = None
        self._sessions: dict[str, Any] = {}
        self._session(self.bundle.model)

    def __getstate__(self) -> dict[str, Any]:
        dropped = ("_pid", "_lock", "_pool", "_sessions")
        return {name: value for name, value in vars(self).items() if name not in dropped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._pid = -1  # of no process: `_own_process` builds the rest on first use

    def _own_process(self) -> None:
        if self._pid != os.getpid():  # unpickled, or forked: the threads of a session stay behind in the parent
            self._start()

    def _session(self, name: str) -> Any:
        with self._lock:
            if name not in self._sessions:
                is_half = self.bundle.dtype == "fp16"
                options = {**(HALF_OPTIONS if is_half else {}), **self.session_options}
                session = open_session(self.bundle.folder / name, self.providers, options)
                if is_half and session.get_providers()[0] == CPU:
                    raise BackendError(
                        f"this bundle is fp16, which can end the process on a CPU; use {CUDA}, or export fp32 or int8"
                    )
                self._check_axes(name, session)
                self._check_empty_tensors(name, session)
                self._sessions[name] = session
            return self._sessions[name]

    def _check_axes(self, name: str, session: Any) -> None:
        """Raise `CheckpointError` unless a graph takes and gives what its place in the bundle calls for."""
        d_embed = self.bundle.text_embeds.shape[1]
        if name == self.bundle.model:
            wanted = {"pixel_values": [3, *self.bundle.preprocess.size], "image_embeds": [d_embed]}
        else:
            wanted = {"input_ids": [self.bundle.context_length], "text_embeds": [d_embed]}
        got = {value.name: list(value.shape)[1:] for value in (*session.get_inputs(), *session.get_outputs())}
        if not wanted.items() <= got.items():
            raise CheckpointError(
                f"{self.bundle.folder / name} has the inputs and outputs {got} (less their first axis); want {wanted}"
            )

    def _check_empty_tensors(self, name: str, session: Any) -> None:
        """Raise `BackendError` where the runtime could end the process on a picture in which no latent fires.

        Graphs that have a strength keep empty tensors from TopK; the ones of before do not.
        """
        sites = self.bundle.defense["sites"] if self.bundle.defense is not None else ()
        ranks = self.bundle.mode == "exact" and any(site["act"] == "topk" for site in sites)
        solves = any(each["edit"] == "project" for site in sites for each in site["sets"])
        if name != self.bundle.model or not (ranks or solves) or strengths_of.input_of(session) is not None:
            return
        version = import_onnxruntime().__version__
        if tuple(map(int, version.split(".")[:2])) < _TOPK_TAKES_NO_ROWS:
            raise BackendError(
                f"this bundle was exported by an older version, and onnxruntime {version} can end the process on its "
                "graph; export the defense again, or install onnxruntime 1.31 or newer"
            )

    @property
    def preprocess(self) -> Preprocess:
        """How pictures are prepared."""
        return self.bundle.preprocess

    @property
    def logit_scale(self) -> float:
        """Factor between cosines and logits."""
        return self.bundle.logit_scale

    @property
    def running_on(self) -> str:
        """The execution provider that runs the vision graph."""
        self._own_process()
        return str(self._session(self.bundle.model).get_providers()[0])

    # --- labels ---

    def label_embeds(self, candidate_labels: Sequence[str] | None = None) -> tuple[tuple[str, ...], np.ndarray]:
        """Return labels, checked, and their text_embeds [n_labels, d_embed], in the templates that are set.

        They are not set: other threads go on with those that are.

        Args:
            candidate_labels: None means those that are set.

        Raises:
            ConfigError: See `set_labels`.
        """
        prompts = self._chosen()
        if candidate_labels is not None:
            prompts = Prompts(labels.check_labels(candidate_labels), prompts.templates)
        return prompts.labels, self._embeds_of(prompts)

    def set_labels(self, candidate_labels: Sequence[str], templates: str | Sequence[str] = "simple") -> OnnxClassifier:
        """Choose what to classify into, and return self.

        Raises:
            ConfigError: See `RobustClassifier.set_labels`; or the bundle has no text tower and no embeddings of these.
        """
        prompts = Prompts(labels.check_labels(candidate_labels), labels.resolve_templates(templates))
        self._embeds_of(prompts)  # so that an error comes now
        self.prompts = prompts
        return self

    def set_label_embeds(self, candidate_labels: Sequence[str], text_embeds: np.ndarray) -> OnnxClassifier:
        """Choose what to classify into by embeddings, and return self.

        Args:
            candidate_labels: At least one, all different.
            text_embeds: Of the text tower of the same CLIP, float32 [n_labels, d_embed]; they are normalized here.

        Raises:
            ShapeError: Another number of rows than labels, or another width than the bundle's.
            NonFiniteError: A number is NaN or infinite.
            ConfigError: See `labels.check_labels`; or an embedding is zero, or that of another label too.
        """
        names, embeds = self.checked_embeds(candidate_labels, text_embeds)
        prompts = Prompts(names, ("{}",))
        self._given[prompts] = embeds
        self.prompts = prompts
        return self

    def checked_embeds(
        self, candidate_labels: Sequence[str], text_embeds: np.ndarray
    ) -> tuple[tuple[str, ...], np.ndarray]:
        """Return labels, checked, and embeddings of them, normalized, without setting them.

        Raises:
            ShapeError, NonFiniteError, ConfigError: See `set_label_embeds`.
        """
        names = labels.check_labels(candidate_labels)
        want = (len(names), self.bundle.text_embeds.shape[1])
        if np.shape(text_embeds) != want:
            raise ShapeError(f"text_embeds is {list(np.shape(text_embeds))}, want {list(want)} for these labels")
        embeds = labels.average_templates(text_embeds, len(names), 1)
        labels.check_apart(names, embeds)
        return names, embeds

    def forget_labels(self, keep: int) -> None:
        """Do as the base class says; the bundle's own embeddings and those that were handed over stay."""
        self._own_process()
        super().forget_labels(keep)

    def _embeds_of(self, prompts: Prompts) -> np.ndarray:
        self._own_process()
        if (given := self._given_embeds(prompts)) is not None:
            return given
        return super()._embeds_of(prompts)

    def _encode_prompts(self, prompts: Prompts) -> np.ndarray:
        if self.bundle.text_model is None or self.bundle.context_length is None:
            raise ConfigError(
                f"this bundle has no text tower: it knows the labels {some(self.bundle.prompts.labels, _N_SHOWN)} "
                f"in the template {_template(self.bundle.prompts.templates)}, and any choice of these. For others "
                "export it with text=True (defense export --text), or hand embeddings to set_label_embeds"
            )
        tokenizer = ClipTokenizer(self.bundle.context_length)
        labels.check_distinct(prompts, tokenizer)
        warn_of_unknown_words(prompts.labels, tokenizer, self.bundle.blank_tokens)
        warn_of_reading(prompts.labels, self.bundle.set_names if self.strength else ())
        return labels.encode_prompts(prompts, tokenizer, self.encode_text)

    def _given_embeds(self, prompts: Prompts) -> np.ndarray | None:
        """Return text_embeds [n_labels, d_embed] of labels that were baked in or handed over, or of some of them.

        None where that is not so. Of several sets that hold them the last one that was handed over is meant.
        """
        if prompts in self._given:
            return self._given[prompts]
        for given, embeds in reversed(self._given.items()):
            row_of = {label: row for row, label in enumerate(given.labels)}
            if given.templates == prompts.templates and row_of.keys() >= set(prompts.labels):
                chosen: np.ndarray = embeds[[row_of[label] for label in prompts.labels]]
                return chosen
        return None

    def encode_text(self, input_ids: np.ndarray) -> np.ndarray:
        """Return the text tower's answer, float32 [n, d_embed], to ids int64 [n, context_length].

        Raises:
            ConfigError: The bundle has no text tower.
        """
        if self.bundle.text_model is None:
            raise ConfigError("this bundle has no text tower; export it with text=True (defense export --text)")
        session = self._session(self.bundle.text_model)
        text_embeds: np.ndarray = session.run(["text_embeds"], {"input_ids": input_ids})[0]
        return text_embeds

    # --- images ---

    def prepared_chunks(
        self, inputs: Iterable[Any], on_error: OnError = "raise", batch_size: int | None = None
    ) -> Iterator[Chunk]:
        """Yield as the base class says, pictures being decoded by several threads, one chunk ahead of the graph."""
        self._own_process()
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(decoding_threads(), thread_name_prefix="defense-decode")
            pool = self._pool
        iterator = iter(inputs)

        def start() -> list[Future[Pixels]]:
            return [
                pool.submit(self._prepare, image) for image in itertools.islice(iterator, batch_size or self.batch_size)
            ]

        ahead = start()
        while ahead:
            current, ahead = ahead, start()
            try:
                chunk = self._chunk([future.result for future in current], on_error)
            except DefenseError:
                for waiting in (*current, *ahead):
                    waiting.cancel()
                raise
            yield chunk

    def _encode_image(self, pixel_values: np.ndarray) -> np.ndarray:
        self._own_process()
        session = self._session(self.bundle.model)
        strengths = np.full(len(pixel_values), self.strength, np.float32)
        (image_embeds,) = self._run(session, ["image_embeds"], pixel_values, strengths)
        return image_embeds

    def outputs(self, pixel_values: np.ndarray, strengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return image_embeds [batch, d_embed] and logits_per_image [batch, n_labels] of the graph itself.

        The logits are for the labels that are baked in. Neither is checked.

        Args:
            pixel_values: As `preprocess` makes them, finite float32 [batch, 3, height, width], at least one.
            strengths: Of each picture, in [0, 1], float32 [batch]; all 1 where the graph has no strength.
        """
        self._own_process()
        session = self._session(self.bundle.model)
        image_embeds, logits = self._run(session, ["image_embeds", "logits_per_image"], pixel_values, strengths)
        return image_embeds, logits

    def _run(
        self, session: Any, names: Sequence[str], pixel_values: np.ndarray, strengths: np.ndarray
    ) -> list[np.ndarray]:
        """Return outputs of the vision graph; a batch that does not fit into memory is halved until it does."""
        feed = {"pixel_values": pixel_values}
        if strengths_of.is_needed(session) or (strengths != 1).any():
            feed[STRENGTH] = strengths_of.fed(session, strengths, self.bundle.folder)
        try:
            outputs: list[np.ndarray] = session.run(names, feed)
            return outputs
        except Exception as error:  # onnxruntime's own exceptions share no base class
            if "allocate" not in str(error) or len(pixel_values) == 1:
                raise BackendError(f"onnxruntime failed on a batch of {len(pixel_values)}: {error}") from error
            half = len(pixel_values) // 2
            log.warning("a batch of %d does not fit into memory, trying %d", len(pixel_values), half)
        parts = (slice(None, half), slice(half, None))
        halves = [self._run(session, names, pixel_values[part], strengths[part]) for part in parts]
        return [np.concatenate(rows) for rows in zip(*halves, strict=True)]

    # --- checks ---

    def check_golden(self) -> float:
        """Return the largest difference between the golden embeddings and what this machine makes of the same pictures.

        Raises:
            CheckpointError: It is larger than the bundle allows.
        """
        want = self.bundle.golden["image_embeds"]
        got = self.with_strength(1).transform(list(self.bundle.golden["pictures"]))
        difference = float(np.abs(got - want).max())
        cosine = float((got * want).sum(1).min())
        tolerance = self.bundle.tolerance
        if not (difference <= tolerance["atol"] and cosine >= tolerance["cosine"]):  # also where it is NaN
            raise CheckpointError(
                f"golden embeddings differ by {difference:.2g} (cosine {cosine:.6f}); the bundle allows "
                f"{tolerance['atol']:.2g} ({tolerance['cosine']}): this runtime does not compute what was exported"
            )
        return difference


def _template(templates: tuple[str, ...]) -> str:
    """Return templates as `set_labels` takes them: the name of a set of them, or the texts."""
    return next(
        (repr(name) for name, texts in labels.TEMPLATES.items() if texts == templates), some(templates, _N_SHOWN)
    )
