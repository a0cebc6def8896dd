"""Images and labels in, predictions out.

The data flow is in the docstring of `RobustClassifier`; each step is one function of the module named beside it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from defense.data import images, labels
from defense.data.labels import Prompts
from defense.data.preprocess import Preprocess
from defense.errors import ConfigError, DefenseError
from defense.hosts.clip import EMBEDDED, Host, load_host
from defense.hosts.controls import Controls, in_force
from defense.hosts.defense import Defense, Golden, Site
from defense.store.defenses import find_defense

from . import explanation
from .explanation import Explanation
from .zeroshot import OnError, ZeroShotClassifier, batched, check_top_k, finite, prediction_of, warn_of_unknown_words
from .zeroshot import Prediction as Prediction

if TYPE_CHECKING:
    from defense.core.ops import Backend
    from defense.core.sae import SparseAutoencoder


log = logging.getLogger(__name__)


class RobustClassifier(ZeroShotClassifier):
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
        defense: Defense | None = None,
        *,
        allow_mismatch: bool = False,
        batch_size: int = 32,
        backend: Backend = "auto",
    ) -> None:
        from defense.hosts.attach import is_wrapped, wrap

        super().__init__(batch_size)
        if defense is None and is_wrapped(host.model):
            raise ConfigError("this host's model is defended already; load it again for a stock CLIP")
        if defense is not None and not allow_mismatch and host.preprocess != defense.preprocess:
            raise ConfigError(
                f"this defense was fitted on pictures prepared with {defense.preprocess}, but this host prepares them "
                f"with {host.preprocess}; use the same, or pass allow_mismatch=True"
            )
        self.host = host
        self.defense = defense
        self._saes: dict[int, SparseAutoencoder] = {}
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

    @property
    def preprocess(self) -> Preprocess:
        """How pictures are prepared."""
        return self.host.preprocess

    @property
    def logit_scale(self) -> float:
        """Factor between cosines and logits."""
        return float(self.host.model.logit_scale.detach().float().exp())

    # --- labels ---

    def _embeds_of(self, prompts: Prompts) -> np.ndarray:
        key = prompts.sha256()
        with self._lock:
            if key not in self._text_embeds:
                warn_of_unknown_words(prompts.labels, self.host.tokenizer, self.blank_tokens())
                self._text_embeds[key] = labels.encode_prompts(prompts, self.host.tokenizer, self.encode_text)
            return self._text_embeds[key]

    def blank_tokens(self) -> np.ndarray | None:
        """Return for each token id whether the text tower has no embedding for it, bool [vocabulary]; None unknown."""
        table = getattr(self.host.model, "token_embedding", None)
        if table is None:
            return None
        is_blank = (table.weight == 0).all(1).cpu().numpy()
        is_blank[0] = False  # padding
        return is_blank

    def encode_text(self, input_ids: np.ndarray) -> np.ndarray:
        """Return the text tower's answer, float32 [n, d_embed], not normalised, to ids int64 [n, context_length]."""
        import torch

        device = next(self.host.model.parameters()).device
        with torch.inference_mode():
            return self.host.model.encode_text(torch.from_numpy(input_ids).to(device)).float().cpu().numpy()

    # --- images ---

    def _encode_image(
        self, pixel_values: np.ndarray, *, plain: bool = False, controls: Controls | None = None
    ) -> np.ndarray:
        """Return image_embeds float32 [batch, d_embed], normalised, of pixel_values [batch, 3, height, width]."""
        import torch

        from defense.hosts.attach import attached

        model = self.host.model
        # The patch embedding's: a mixed-precision model keeps other parameters in float32.
        weight = next(parameter for parameter in model.visual.parameters() if parameter.ndim == 4)
        batch = torch.from_numpy(pixel_values).to(weight.device, weight.dtype)
        with self._lock, torch.inference_mode():
            if controls is not None:
                active: AbstractContextManager = in_force(self, controls)
            elif plain and self.defense is not None:
                active = attached(model).bypassed()
            else:
                active = nullcontext()
            with active:
                embeds = model.encode_image(batch)
            return torch.nn.functional.normalize(embeds.float(), dim=-1).cpu().numpy()

    def chunks(
        self, inputs: Iterable[Any], on_error: OnError = "raise"
    ) -> Iterator[tuple[list[DefenseError | None], np.ndarray]]:
        """Yield `batch_size` pictures at a time: for each None or its error, and pixel_values of the good ones."""
        for chunk in batched(inputs, self.batch_size):
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

    def encode_pixels(self, pixel_values: np.ndarray, *, plain: bool = False) -> np.ndarray:
        """Return image_embeds, float32 [batch, d_embed], of prepared pixel_values [batch, 3, height, width].

        Args:
            pixel_values: As `host.preprocess` makes them, float32.
            plain: Without the defense.

        Raises:
            NonFiniteError: A pixel is NaN or infinite.
        """
        return self._encode_image(finite(pixel_values), plain=plain)

    # --- explanations ---

    def explain(self, image: Any, *, top_k: int | None = None, controls: Controls | None = None) -> Explanation:
        """Return the plain and the robust answer for one picture and what made the difference.

        Args:
            image: See `images.decode`.
            top_k: Only the best so many labels.
            controls: What of the defense is in force; by default all of it.

        Raises:
            ConfigError: There is no defense to explain, or see `explain.Controls`.
        """
        import torch

        check_top_k(top_k)
        decoded = images.decode(image)
        pixel_values = self.host.preprocess(decoded.image)[None]
        prompts = self._chosen()
        text_embeds = self._embeds_of(prompts)
        with self._lock, torch.inference_mode():
            plain, plain_ms = self._timed(pixel_values, plain=True)
            with in_force(self, controls) as defense, defense.recording():
                robust, robust_ms = self._timed(pixel_values)
                removed, heatmap, fraction = explanation.account(defense)
        return Explanation(
            plain=prediction_of(prompts.labels, self.scores(plain, text_embeds)[0], top_k),
            robust=prediction_of(prompts.labels, self.scores(robust, text_embeds)[0], top_k),
            removed=removed,
            heatmap=heatmap,
            fraction=fraction,
            warnings=decoded.warnings,
            plain_ms=plain_ms,
            robust_ms=robust_ms,
            box=self.host.preprocess.seen_box(*decoded.image.size),
            controls=controls or Controls(),
        )

    def _timed(self, pixel_values: np.ndarray, *, plain: bool = False) -> tuple[np.ndarray, float]:
        """Return image_embeds and how long they took, in milliseconds."""
        start = time.perf_counter()
        image_embeds = self._encode_image(pixel_values, plain=plain)  # on the CPU: a GPU has been waited for
        return image_embeds, 1000 * (time.perf_counter() - start)

    def classify_with(self, image: Any, controls: Controls, *, top_k: int | None = None) -> Prediction:
        """Return the answer for one picture with the defense adjusted, without accounting for what it removed.

        Args:
            image: See `images.decode`.
            controls: What of the defense is in force.
            top_k: Only the best so many labels.

        Raises:
            ConfigError: There is no defense to adjust, or see `explain.Controls`.
        """
        check_top_k(top_k)
        prompts = self._chosen()
        image_embeds = self._encode_image(self._prepare(image)[None], controls=controls)
        return prediction_of(prompts.labels, self.scores(image_embeds, self._embeds_of(prompts))[0], top_k)

    def latent_map(self, image: Any, hook_point: str, latent: int) -> np.ndarray:
        """Return a latent's activation at each patch of a picture in the plain network, float32 [rows, columns].

        Args:
            image: See `images.decode`.
            hook_point: One of the defense's.
            latent: Any of the SAE there.

        Raises:
            ConfigError: There is no such latent, or see `sae`.
            InvalidImageError: The picture cannot be read.
        """
        from defense.hosts.tap import latent_map

        with self._lock:  # another thread's pass would undo the bypass
            return latent_map(self.host, hook_point, self.sae(hook_point), latent, image)

    def sae(self, hook_point: str) -> SparseAutoencoder:
        """Return the whole SAE at a hook point of the defense, on the model's device.

        It is made on first use and kept, which takes as much memory again as the SAE has.

        Raises:
            ConfigError: There is no defense, or it has no such hook point.
        """
        sites = [] if self.defense is None else [site for site in self.defense.sites if site.hook_point == hook_point]
        if not sites:
            raise ConfigError(f"this classifier has no defense at {hook_point!r}")
        return self._sae_of(sites[0])

    def _sae_of(self, site: Site) -> SparseAutoencoder:
        import torch

        from defense.hosts.attach import sae_of

        with self._lock, torch.inference_mode(False):  # it stays, for whoever needs gradients too
            if id(site) not in self._saes:  # a classifier's sites live as long as it does
                self._saes[id(site)] = sae_of(site).to(self.host.model.logit_scale.device)
            return self._saes[id(site)]


def make_golden(clf: RobustClassifier, pictures: np.ndarray) -> Golden:
    """Return reference answers of a classifier for pictures, uint8 [n, height, width, 3]."""
    from PIL import Image

    pixel_values = np.stack([clf.host.preprocess(Image.fromarray(picture)) for picture in pictures])
    return Golden(pictures, clf.encode_pixels(pixel_values, plain=True), clf.encode_pixels(pixel_values))


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
