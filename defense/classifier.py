"""Images and labels in, predictions out.

The data flow is in the docstring of `RobustClassifier`; each step is one function of the module named beside it.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from . import artefact, images, labels
from .errors import CheckpointError, ConfigError, DefenseError, MissingDependencyError, NonFiniteError

if TYPE_CHECKING:
    from .attach import AttachedDefense
    from .ops import Backend

log = logging.getLogger(__name__)

OnError = Literal["raise", "skip", "return"]
Prediction = list[dict[str, Any]]
"""[{"label": str, "score": float}, ...], best first; scores are a softmax over the given labels."""

EMBEDDED = "embedded"


@dataclass(frozen=True)
class Removed:
    """One latent that was suppressed in a picture.

    Attributes:
        hook_point: Where.
        set_name: The latent set it belongs to, e.g. "text".
        latent: Its index in the SAE.
        energy: Squared norm of what it had written there, summed over tokens.
        share: That energy as a fraction of all latents' energy.
    """

    hook_point: str
    set_name: str
    latent: int
    energy: float
    share: float


@dataclass(frozen=True)
class Explanation:
    """What the defense did to one picture.

    Attributes:
        plain: The stock CLIP's answer.
        robust: The defended one's.
        removed: The latents that were suppressed, by falling energy.
        heatmap: Squared norm of what was removed at each patch, float32 [rows, columns].
        fraction: Norm of what was removed over the norm of the residual, over all tokens of the edited blocks.
        warnings: What the decoder had to say about the file.
    """

    plain: Prediction
    robust: Prediction
    removed: tuple[Removed, ...]
    heatmap: np.ndarray
    fraction: float
    warnings: tuple[str, ...] = ()

    @property
    def changed(self) -> bool:
        """Whether the defense changed the answer."""
        return bool(self.plain[0]["label"] != self.robust[0]["label"])

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "plain": self.plain,
            "robust": self.robust,
            "changed": self.changed,
            "removed": [vars(item) for item in self.removed],
            "heatmap": self.heatmap.tolist(),
            "fraction": self.fraction,
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True)
class Host:
    """A CLIP and what prepares its inputs."""

    model: Any  # an open_clip model; its own classes carry no types
    preprocess: images.Preprocess
    tokenizer: Callable[[list[str]], Any]


def load_host(model: str = EMBEDDED, pretrained: str | None = None, *, device: str = "cpu") -> Host:
    """Load a CLIP through open_clip.

    Args:
        model: "embedded", or whatever open_clip takes: a name such as "ViT-B-32", "hf-hub:org/repo", "local-dir:path".
        pretrained: open_clip's tag or a path, for a plain name. A tag that is not cached is downloaded.
        device: "cpu", "cuda", "cuda:1" or "auto".

    Raises:
        MissingDependencyError: torch or open_clip is not installed.
        ConfigError: A plain name without `pretrained`, or one that open_clip does not know.
    """
    try:
        import open_clip
    except ImportError as error:
        raise MissingDependencyError(error.name or "torch", "torch") from error
    has_schema = model.startswith(("hf-hub:", "local-dir:"))
    if model == EMBEDDED:
        model, has_schema = f"local-dir:{embedded_folder('clip')}", True
    if not has_schema:
        if model not in open_clip.list_models():
            raise ConfigError(f"open_clip knows no model {model!r}; `open_clip.list_models()` names them all")
        if pretrained is None:
            raise ConfigError(
                f"{model} needs weights: give pretrained=, one of {open_clip.list_pretrained_tags_by_model(model)}"
            )
    try:
        net = open_clip.create_model(model, pretrained=pretrained, device=resolve_device(device))
    except (RuntimeError, ValueError, OSError) as error:
        raise ConfigError(f"open_clip cannot load {model!r} (pretrained={pretrained!r}): {error}") from error
    config = open_clip.get_model_config(model)
    if config is None:
        raise ConfigError(f"open_clip gives no configuration of {model!r}, so its tokenizer is unknown")
    text_cfg = config["text_cfg"]
    if text_cfg.get("hf_tokenizer_name") or text_cfg.get("hf_model_name"):
        tokenizer = open_clip.get_tokenizer(model)
    else:
        tokenizer = labels.ClipTokenizer(text_cfg.get("context_length", 77))
    preprocess = images.Preprocess.from_open_clip(open_clip.get_model_preprocess_cfg(net))
    return Host(net.eval().requires_grad_(False), preprocess, tokenizer)


def resolve_device(device: str) -> str:
    """Return the torch device for "auto" or a name.

    Raises:
        BackendError: CUDA was asked for and is not there.
    """
    import torch

    from .errors import BackendError

    has_cuda = torch.cuda.is_available()
    if device == "auto":
        return "cuda" if has_cuda else "cpu"
    if device.startswith("cuda") and not has_cuda:
        raise BackendError(
            f"device={device!r} was asked for, but torch {torch.__version__} sees no CUDA device; use 'cpu'"
        )
    return device


def embedded_folder(name: str) -> Path:
    """Return a folder of the embedded model: "clip", or the name of one of its defenses."""
    return Path(str(resources.files("defense.embedded").joinpath(name)))


def find_defense(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
    token: str | None = None,
) -> artefact.Defense:
    """Load a defense by name: "embedded", a folder, or a hub id ("org/repo").

    Raises:
        CheckpointError: There is no such defense, or it cannot be used.
    """
    if source == EMBEDDED:
        return artefact.load(embedded_folder("text"))
    path = Path(source)
    if path.exists():
        return artefact.load(path)
    if str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        raise CheckpointError(
            f"no defense at {source}: it is neither a folder, nor a hub id ('org/repo'), nor 'embedded'"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            str(source), revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, token=token,
            allow_patterns=["*.json", "*.safetensors"], etag_timeout=10,
        )  # fmt: skip
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise CheckpointError(f"no folder {source}, and the hub did not give {source!r}: {error}") from error
    return artefact.load(folder)


class RobustClassifier:
    """A zero-shot classifier that does not read what it should look at.

        image   --images.decode, Preprocess-->        pixel_values [batch, 3, height, width]
                --blocks 0..L-->                      resid_post.L [batch, pos, d_model]
                --Suppressor (attach.py)-->             resid_post.L without what S wrote
                --blocks L+1.., pool, proj-->         image_embeds [batch, d_embed], normalised
        labels  --labels.encode_prompts, once-->      text_embeds [n_labels, d_embed], normalised
                --logit_scale * cos, softmax-->       scores [batch, n_labels]

    Args:
        host: The CLIP, undefended.
        defense: What to edit in it; None for a stock CLIP behind the same calls.
        allow_mismatch: See `wrap`.
        batch_size: Pictures decoded and encoded at once.
        backend: See `wrap`.

    Raises:
        ConfigError, ShapeError, HookPointError, BackendError: See `wrap`.
    """

    def __init__(
        self,
        host: Host,
        defense: artefact.Defense | None = None,
        *,
        allow_mismatch: bool = False,
        batch_size: int = 32,
        backend: Backend = "auto",
    ) -> None:
        from .attach import is_wrapped, wrap

        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size}; it must be at least 1")
        if defense is None and is_wrapped(host.model):
            raise ConfigError("this host's model is defended already; load it again for a stock CLIP")
        if defense is not None and not allow_mismatch and host.preprocess != defense.preprocess:
            raise ConfigError(
                f"this defense was fitted on pictures prepared with {defense.preprocess}, but this host prepares them "
                f"with {host.preprocess}; use the same, or pass allow_mismatch=True"
            )
        self.host = host
        self.defense = defense
        self.batch_size = batch_size
        self.prompts: labels.Prompts | None = None
        self._text_embeds: dict[str, np.ndarray] = {}
        self._lock = threading.RLock()
        if defense is not None:
            wrap(host.model, defense, allow_mismatch=allow_mismatch, backend=backend)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str] = EMBEDDED,
        *,
        model: str | None = None,
        pretrained: str | None = None,
        sets: Sequence[str] | None = None,
        revision: str | None = None,
        cache_dir: str | None = None,
        local_files_only: bool = False,
        token: str | None = None,
        device: str = "auto",
        allow_mismatch: bool = False,
        batch_size: int = 32,
        backend: Backend = "auto",
    ) -> RobustClassifier:
        """Load a defense and the CLIP that it was fitted on.

        Args:
            source: "embedded" (offline, nothing is downloaded), a folder, or a hub id.
            model: In place of the CLIP that the defense names; its weights must be the same.
            pretrained: open_clip's tag, with `model`.
            sets: The latent sets to use, by name; all by default.
            revision: Commit of the hub repository.
            cache_dir: Where hub files are kept.
            local_files_only: Do not use the network.
            token: For private hub repositories.
            device: "auto", "cpu", "cuda" or "cuda:1".
            allow_mismatch: See `wrap`.
            batch_size: Pictures decoded and encoded at once.
            backend: See `wrap`.
        """
        defense = find_defense(
            source, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, token=token
        )
        if sets is not None:
            defense = defense.only(*sets)
        if model is None:
            model, pretrained = defense.host.model, defense.host.pretrained
        host = load_host(model, pretrained, device=device)
        return cls(host, defense, allow_mismatch=allow_mismatch, batch_size=batch_size, backend=backend)

    # --- labels ---

    def set_labels(
        self, candidate_labels: Sequence[str], templates: str | Sequence[str] = "simple"
    ) -> RobustClassifier:
        """Choose what to classify into, and return self. Labels are encoded once and cached.

        Args:
            candidate_labels: At least one, all different.
            templates: "simple", "hf", "openai", a template with a literal {}, or several.

        Raises:
            ConfigError: See `labels.check_labels` and `labels.resolve_templates`.
        """
        self.prompts = labels.Prompts(labels.check_labels(candidate_labels), labels.resolve_templates(templates))
        return self

    @property
    def classes_(self) -> np.ndarray:
        """The labels, in the order of `predict_proba`'s columns."""
        return np.array(self._labels(), dtype=object)

    def _labels(self) -> tuple[str, ...]:
        if self.prompts is None:
            raise ConfigError("no labels are set; call set_labels([...]), or pass candidate_labels=[...]")
        return self.prompts.labels

    def text_embeds(self) -> np.ndarray:
        """Return the labels' embeddings, float32 [n_labels, d_embed], normalised."""
        self._labels()
        assert self.prompts is not None
        return self._embeds_of(self.prompts)

    def _embeds_of(self, prompts: labels.Prompts) -> np.ndarray:
        key = prompts.sha256()
        with self._lock:
            if key not in self._text_embeds:
                self._warn_of_unknown_words(prompts.labels)
                self._text_embeds[key] = labels.encode_prompts(prompts, self.host.tokenizer, self._encode_text)
            return self._text_embeds[key]

    def _warn_of_unknown_words(self, names: Sequence[str]) -> None:
        """Log the labels with a word that the text tower has no embedding for: most words, for the embedded model."""
        table = getattr(self.host.model, "token_embedding", None)
        if table is None:
            return
        is_blank = (table.weight == 0).all(1).cpu().numpy()
        is_blank[0] = False  # padding
        unknown = [name for name in names if is_blank[np.asarray(self.host.tokenizer([name]))].any()]
        if unknown:
            log.warning("this model never saw these labels, and guesses: %s", ", ".join(map(repr, unknown)))

    def _encode_text(self, input_ids: np.ndarray) -> np.ndarray:
        import torch

        device = next(self.host.model.parameters()).device
        with torch.inference_mode():
            return self.host.model.encode_text(torch.from_numpy(input_ids).to(device)).float().cpu().numpy()

    # --- images ---

    def _encode_image(self, pixel_values: np.ndarray, *, plain: bool = False) -> np.ndarray:
        """Return image_embeds float32 [batch, d_embed], normalised, of pixel_values [batch, 3, height, width]."""
        import torch

        from .attach import attached

        model = self.host.model
        # The patch embedding's: a mixed-precision model keeps other parameters in float32.
        weight = next(parameter for parameter in model.visual.parameters() if parameter.ndim == 4)
        batch = torch.from_numpy(pixel_values).to(weight.device, weight.dtype)
        with self._lock, torch.inference_mode():
            if plain and self.defense is not None:
                with attached(model).bypassed():
                    embeds = model.encode_image(batch)
            else:
                embeds = model.encode_image(batch)
            return torch.nn.functional.normalize(embeds.float(), dim=-1).cpu().numpy()

    def _scores(self, image_embeds: np.ndarray, text_embeds: np.ndarray) -> np.ndarray:
        """Return the softmax over labels, float32 [batch, n_labels]."""
        scale = float(self.host.model.logit_scale.detach().float().exp())
        logits = scale * image_embeds @ text_embeds.T
        weights = np.exp(logits - logits.max(1, keepdims=True))
        return weights / weights.sum(1, keepdims=True)

    def _prepare(self, image: Any) -> np.ndarray:
        return self.host.preprocess(images.decode(image).image)

    def _chunks(
        self, inputs: Iterable[Any], on_error: OnError
    ) -> Iterator[tuple[list[DefenseError | None], np.ndarray]]:
        """Yield `batch_size` pictures at a time: for each None or its error, and pixel_values of the good ones."""
        for chunk in _batched(inputs, self.batch_size):
            errors: list[DefenseError | None] = []
            prepared = []
            for image in chunk:
                try:
                    prepared.append(self._prepare(image))
                    errors.append(None)
                except DefenseError as error:
                    if on_error == "raise":
                        raise
                    log.warning("skipped a picture: %s", error)
                    errors.append(error)
            height, width = self.host.preprocess.size
            yield errors, np.stack(prepared) if prepared else np.empty((0, 3, height, width), np.float32)

    def stream(self, inputs: Iterable[Any], *, on_error: OnError = "raise", top_k: int | None = None) -> Iterator[Any]:
        """Yield a `Prediction` for each picture, or its error object (`on_error="return"`); memory stays flat.

        The labels are those set when this is called, whatever is set while the stream runs.

        Args:
            inputs: Pictures of any kind that `images.decode` takes.
            on_error: "raise" the first error, "skip" bad pictures with a log line, or "return" the error in its place.
            top_k: Only the best so many labels.
        """
        self._labels()
        assert self.prompts is not None
        return self._stream(inputs, self.prompts, on_error, top_k)

    def _stream(
        self, inputs: Iterable[Any], prompts: labels.Prompts, on_error: OnError, top_k: int | None
    ) -> Iterator[Any]:
        if on_error not in get_args(OnError):
            raise ConfigError(f"on_error={on_error!r}; it must be one of {', '.join(get_args(OnError))}")
        _check_top_k(top_k)
        return self._predictions(inputs, prompts, on_error, top_k)

    def _predictions(
        self, inputs: Iterable[Any], prompts: labels.Prompts, on_error: OnError, top_k: int | None
    ) -> Iterator[Any]:
        text_embeds = self._embeds_of(prompts)
        for errors, pixel_values in self._chunks(inputs, on_error):
            scores = iter(self._scores(self._encode_image(pixel_values), text_embeds) if len(pixel_values) else ())
            for error in errors:
                if error is None:
                    yield _prediction(prompts.labels, next(scores), top_k)
                elif on_error == "return":
                    yield error

    def __call__(
        self,
        images: Any,
        candidate_labels: Sequence[str] | None = None,
        *,
        hypothesis_template: str | None = None,
        on_error: OnError = "raise",
        top_k: int | None = None,
    ) -> Any:
        """Classify, in the shape of the zero-shot-image-classification pipeline.

        Args:
            images: One picture (path, bytes, file object, PIL image, HWC uint8 array), a list of them, or an iterator.
            candidate_labels: What to classify into, for this call; by default what `set_labels` chose.
            hypothesis_template: A template with a literal {}, for this call; by default the one chosen before.
            on_error: See `stream`. A single picture always raises.
            top_k: Only the best so many labels.

        Returns:
            A `Prediction` for one picture, a list of them for a list, an iterator of them for an iterator.
        """
        chosen = self._labels() if candidate_labels is None else labels.check_labels(candidate_labels)
        before = self.prompts.templates if self.prompts is not None else "simple"
        prompts = labels.Prompts(chosen, labels.resolve_templates(hypothesis_template or before))
        if isinstance(images, (list, tuple)):
            return list(self._stream(images, prompts, on_error, top_k))
        if isinstance(images, Iterator) and not hasattr(images, "read"):
            return self._stream(images, prompts, on_error, top_k)
        (prediction,) = self._stream([images], prompts, "raise", top_k)
        return prediction

    # --- in the shape of scikit-learn ---

    def transform(self, X: Iterable[Any]) -> np.ndarray:
        """Return image_embeds, float32 [n, d_embed], normalised."""
        if isinstance(X, (str, bytes, os.PathLike)):
            raise ConfigError(f"X must be a list of pictures, not one: [{X!r}]")
        parts = [self._encode_image(pixel_values) for _, pixel_values in self._chunks(X, "raise")]
        if not parts:
            return self._encode_image(np.zeros((1, 3, *self.host.preprocess.size), np.float32))[:0]
        return np.concatenate(parts)

    def predict_proba(self, X: Iterable[Any]) -> np.ndarray:
        """Return scores, float32 [n, n_labels], columns in the order of `classes_`, rows summing to 1."""
        return self._scores(self.transform(X), self.text_embeds())

    def predict(self, X: Iterable[Any]) -> np.ndarray:
        """Return the best label of each picture, [n]."""
        return self.classes_[self.predict_proba(X).argmax(1)]

    def encode_pixels(self, pixel_values: np.ndarray, *, plain: bool = False) -> np.ndarray:
        """Return image_embeds, float32 [batch, d_embed], of prepared pixel_values [batch, 3, height, width].

        Args:
            pixel_values: As `host.preprocess` makes them, float32.
            plain: Without the defense.

        Raises:
            NonFiniteError: A pixel is NaN or infinite.
        """
        if not np.isfinite(pixel_values).all():
            raise NonFiniteError("input")
        return self._encode_image(np.ascontiguousarray(pixel_values, np.float32), plain=plain)

    # --- explanations ---

    def explain(self, image: Any, *, top_k: int | None = None) -> Explanation:
        """Return the plain and the robust answer for one picture and what made the difference.

        Raises:
            ConfigError: There is no defense to explain.
        """
        if self.defense is None:
            raise ConfigError("this classifier has no defense, so there is nothing to explain")
        import torch

        from .attach import attached

        decoded = images.decode(image)
        pixel_values = self.host.preprocess(decoded.image)[None]
        _check_top_k(top_k)
        names, text_embeds = self._labels(), self.text_embeds()
        plain = self._scores(self._encode_image(pixel_values, plain=True), text_embeds)[0]
        defense = attached(self.host.model)
        with self._lock, defense.recording(), torch.inference_mode():
            robust = self._scores(self._encode_image(pixel_values), text_embeds)[0]
            removed, heatmap, fraction = _account(defense)
        return Explanation(
            plain=_prediction(names, plain, top_k),
            robust=_prediction(names, robust, top_k),
            removed=removed,
            heatmap=heatmap,
            fraction=fraction,
            warnings=decoded.warnings,
        )


def _batched(inputs: Iterable[Any], size: int) -> Iterator[tuple[Any, ...]]:
    iterator = iter(inputs)
    while chunk := tuple(itertools.islice(iterator, size)):
        yield chunk


def _check_top_k(top_k: int | None) -> None:
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k={top_k}; it must be at least 1")


def _prediction(names: Sequence[str], scores: np.ndarray, top_k: int | None) -> Prediction:
    order = np.argsort(-scores, kind="stable")[:top_k]
    return [{"label": names[i], "score": float(scores[i])} for i in order]


def _account(defense: AttachedDefense) -> tuple[tuple[Removed, ...], np.ndarray, float]:
    """Add up what a recorded pass over one picture removed: by latent, by patch, and over the residual's norm."""
    from .suppress import suppress

    latents: list[tuple[str, str, int, float]] = []
    heatmap = np.zeros(defense.grid_size, np.float32)
    lost = held = 0.0
    for block in defense.edited_blocks():
        assert block.seen is not None
        parts = block.parts()
        delta = block.seen.float() - suppress(block.seen, parts, block.n_prefix).float()
        per_token = delta[0].square().sum(-1)
        lost += float(per_token.sum())
        held += float(block.seen.float().square().sum())
        heatmap += per_token[block.n_prefix :].reshape(defense.grid_size).cpu().numpy()
        for part in parts:
            energies = part.energy(block.seen[:, part.token_slice(block.n_prefix)])[0].tolist()
            for latent, energy in zip(part.latents.tolist(), energies, strict=True):
                latents.append((block.hook_point, part.latent_set.name, latent, energy))
    total = sum(energy for *_, energy in latents) or 1.0
    ranked = sorted((item for item in latents if item[3] > 0), key=lambda item: -item[3])
    removed = tuple(Removed(point, name, latent, energy, energy / total) for point, name, latent, energy in ranked)
    return removed, heatmap, math.sqrt(lost / held) if held else 0.0


def make_golden(clf: RobustClassifier, pictures: np.ndarray) -> artefact.Golden:
    """Return reference answers of a classifier for pictures, uint8 [n, height, width, 3]."""
    from PIL import Image

    pixel_values = np.stack([clf.host.preprocess(Image.fromarray(picture)) for picture in pictures])
    return artefact.Golden(pictures, clf.encode_pixels(pixel_values, plain=True), clf.encode_pixels(pixel_values))


def golden_difference(clf: RobustClassifier) -> float:
    """Return the largest difference between a classifier's embeddings and its defense's golden ones.

    Raises:
        ConfigError: The defense holds none.
    """
    golden = clf.defense.golden if clf.defense is not None else None
    if golden is None:
        raise ConfigError("this classifier's defense holds no golden vectors")
    now = make_golden(clf, golden.pictures)
    differences = [np.abs(now.plain - golden.plain).max(), np.abs(now.defended - golden.defended).max()]
    return float(np.max(differences))  # unlike max(), NaN where one is NaN
