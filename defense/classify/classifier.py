"""`RobustClassifier`: pictures and labels in, predictions out, computed with torch. Its docstring has the data flow."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from defense.data import images, labels
from defense.data.labels import Prompts
from defense.data.notes import NoteLog
from defense.data.preprocess import Preprocess
from defense.errors import ConfigError
from defense.hosts import shipped
from defense.hosts.clip import Clip
from defense.hosts.controls import Controls, applied
from defense.hosts.defense import Defense, Site
from defense.store import defenses
from defense.store.hub import Hub
from defense.store.pushing import push

from .answers import Chunk, OnError, Prediction, prediction_of
from .explanation import Explanation, account
from .finding import clip_and_defense
from .inputs import batched, check_top_k, finite
from .label_warnings import warn_of_reading, warn_of_unknown_words
from .zeroshot import ZeroShotClassifier

if TYPE_CHECKING:
    import torch

    from defense.core.ops import Backend
    from defense.core.sae import SparseAutoencoder
    from defense.core.suppress import Suppression
    from defense.hosts.attach import AttachedDefense

log = logging.getLogger(__name__)


class RobustClassifier(ZeroShotClassifier):
    """A CLIP with a defense in it, or without one, as a zero-shot classifier.

        image   --images.decode, Preprocess-->        pixel_values [batch, 3, height, width]
                --blocks 0..L-->                      resid_post.L [batch, pos, d_model]
                --Suppressor (attach.py)-->             resid_post.L without what S wrote
                --blocks L+1.., pool, proj-->         image_embeds [batch, d_embed], normalized
        labels  --labels.encode_prompts, once-->      text_embeds [n_labels, d_embed], normalized
                --logit_scale * cos, softmax-->       scores [batch, n_labels]

    Args:
        clip: The CLIP, undefended.
        defense: What to edit in it; None for a stock CLIP behind the same calls.
        allow_mismatch: See `wrap`.
        batch_size: Pictures decoded and encoded at once.
        backend: See `wrap`.
        limits: What pictures are accepted.

    Raises:
        ConfigError, ShapeError, HookPointError, BackendError: See `wrap`.
    """

    def __init__(
        self,
        clip: Clip,
        defense: Defense | None = None,
        *,
        allow_mismatch: bool = False,
        batch_size: int = 32,
        backend: Backend = "auto",
        limits: images.Limits = images.DEFAULT_LIMITS,
    ) -> None:
        from defense.hosts.attach import is_wrapped, wrap

        super().__init__(batch_size, limits=limits)
        if not isinstance(clip, Clip):
            raise ConfigError(
                f"clip is a {type(clip).__name__}; want a Clip, as load_clip(...) returns it. RobustClassifier."
                "from_pretrained(...) loads a CLIP and its defense by name"
            )
        if defense is not None and not isinstance(defense, Defense):
            raise ConfigError(f"defense is {defense!r:.80}; want a Defense, as find_defense(...) returns it")
        if defense is None and is_wrapped(clip.model):
            raise ConfigError("this CLIP's model is defended already; load it again for a stock CLIP")
        self.clip = clip
        self.defense = defense
        self.allow_mismatch = allow_mismatch
        self.backend = backend
        self._pid = os.getpid()
        self._saes: dict[int, SparseAutoencoder] = {}
        if defense is not None:
            wrap(clip.model, defense, processor=clip.preprocess, allow_mismatch=allow_mismatch, backend=backend)

    def __getstate__(self) -> dict[str, Any]:
        # The SAEs are kept by the `id` of their sites, which a copy does not have; they are made anew when needed.
        return {**super().__getstate__(), "_saes": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._pid = os.getpid()

    def _own_process(self) -> None:
        """Keep torch in a forked process from waiting for the threads of its pool, which stayed in the parent."""
        import torch

        if self._pid != os.getpid():
            self._pid = os.getpid()
            if torch.get_num_threads() > 1 and self.clip.device.type == "cpu":
                torch.set_num_threads(1)  # as torch's own loader does in its workers
                log.warning("this process was forked: torch uses one thread in it; spawned processes use more")

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str] = shipped.DEFAULT,
        *,
        model: str | None = None,
        pretrained: str | None = None,
        sets: Sequence[str] | None = None,
        revision: str | None = None,
        cache_dir: str | None = None,
        local_files_only: bool = False,
        token: str | None = None,
        device: str | int | torch.device = "auto",
        allow_mismatch: bool = False,
        batch_size: int = 32,
        backend: Backend = "auto",
        limits: images.Limits = images.DEFAULT_LIMITS,
    ) -> RobustClassifier:
        """Load a defense and the CLIP that it was fitted on.

            RobustClassifier.from_pretrained("ViT-B-32", pretrained="openai")

        takes the name of a CLIP instead, and the defense that is ready for these weights: the one that `defense
        protect` made here, else the one that the registry lists, which is fetched and checked.

        Args:
            source: "photo" or "embedded" (offline, nothing is downloaded), a folder, a hub id, or the name of a CLIP.
            model: Name of a CLIP (see `load_clip`), in place of the one that the defense names; its weights must be the
                same, whatever library they are of.
            pretrained: open_clip's tag of the weights of `model`, or of `source` where that names a CLIP.
            sets: The latent sets to use, by name; all by default.
            revision: Commit of the hub repository.
            cache_dir: Where hub files are kept.
            local_files_only: Do not use the network.
            token: For private hub repositories.
            device: See `resolve_device`.
            allow_mismatch: See `wrap`.
            batch_size: Pictures decoded and encoded at once.
            backend: See `wrap`.
            limits: What pictures are accepted.

        Raises:
            ConfigError: `pretrained` without `model`, a shipped defense for another model, a set that the defense
                does not have, or see `load_clip`.
            CheckpointError: There is no such defense, or it cannot be used; or none is ready for a CLIP.
            ShapeError, HookPointError, BackendError: See `wrap`.
        """
        clip, defense = clip_and_defense(
            source, model, pretrained, device=device, revision=revision, hub=Hub(cache_dir, local_files_only, token)
        )
        if sets is not None:
            defense = defense.only(*sets)
        return cls(clip, defense, allow_mismatch=allow_mismatch, batch_size=batch_size, backend=backend, limits=limits)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write the defense as a folder that `from_pretrained` takes, and return it; the CLIP's weights are not in it.

        Args:
            folder: Where to; its parent must exist. A defense that is there is replaced.

        Raises:
            ConfigError: There is no defense, or see `defenses.save`.
        """
        return defenses.save(self._own_defense(), folder)

    def push_to_hub(self, repo: str, *, private: bool = False, token: str | None = None) -> str:
        """Publish the defense with a card, and return its address; see `pushing.push`.

        Args:
            repo: "org/repo"; made where it is not there.
            private: Make it for its owners alone.
            token: By default the one that the hub's client is logged in with.

        Raises:
            ConfigError: There is no defense, or `repo` has another form.
            CheckpointError: The hub refuses.
        """
        return push(self._own_defense(), repo, private=private, token=token)

    def _own_defense(self) -> Defense:
        if self.defense is None:
            raise ConfigError("this classifier has no defense to save; it is a stock CLIP")
        return self.defense

    @property
    def preprocess(self) -> Preprocess:
        """How pictures are prepared."""
        return self.clip.preprocess

    @property
    def logit_scale(self) -> float:
        """Factor between cosines and logits."""
        return self.clip.logit_scale

    # --- labels ---

    def set_labels(
        self, candidate_labels: Sequence[str], templates: str | Sequence[str] = "simple"
    ) -> RobustClassifier:
        """Choose what to classify into, and return self; see the base class.

        Raises:
            ConfigError: See the base class; two labels that are one to the text tower are refused here.
        """
        prompts = Prompts(labels.check_labels(candidate_labels), labels.resolve_templates(templates))
        if prompts.sha256() not in self._text_embeds:  # else it was done before they were encoded
            labels.check_distinct(prompts, self.clip.tokenizer)
        self.prompts = prompts
        return self

    def _encode_prompts(self, prompts: Prompts) -> np.ndarray:
        self._own_process()
        labels.check_distinct(prompts, self.clip.tokenizer)  # those of one call were not seen by `set_labels`
        warn_of_unknown_words(prompts.labels, self.clip.tokenizer, self.clip.blank_tokens())
        warn_of_reading(prompts.labels, () if self.defense is None else self.defense.sets)
        return self.clip.text_embeds(prompts)

    def encode_text(self, input_ids: np.ndarray) -> np.ndarray:
        """Return text embeddings, float32 [n, d_embed], not normalized, of ids int64 [n, context_length]."""
        self._own_process()
        return self.clip.encode_text(input_ids)

    # --- images ---

    def _encode_image(
        self, pixel_values: np.ndarray, *, plain: bool = False, controls: Controls | None = None
    ) -> np.ndarray:
        """Return image_embeds float32 [batch, d_embed], normalized, of pixel_values [batch, 3, height, width].

        Args:
            pixel_values: Float32.
            plain: Without the defense; not together with `controls`.
            controls: What of the defense is active; all of it where None.
        """
        import torch

        self._own_process()
        with self._lock, torch.inference_mode():
            if controls is not None:
                active: AbstractContextManager[object] = self._applied(controls)
            else:
                active = self.clip.undefended() if plain else nullcontext()
            with active:
                return self.clip.image_embeds(pixel_values).cpu().numpy()

    def prepared_chunks(
        self, inputs: Iterable[Any], on_error: OnError = "raise", batch_size: int | None = None
    ) -> Iterator[Chunk]:
        """Yield up to `batch_size` pictures at a time; see the base class."""
        for chunk in batched(inputs, batch_size or self.batch_size):
            yield self._chunk((partial(self._prepare, image) for image in chunk), on_error)

    def encode_pixels(self, pixel_values: Any, *, plain: bool = False) -> np.ndarray:
        """Return image_embeds, float32 [batch, d_embed], of prepared pixel_values [batch, 3, height, width].

        Args:
            pixel_values: See the base class.
            plain: Without the defense.

        Raises:
            ShapeError, ConfigError, NonFiniteError: See the base class.
        """
        return self._embeds_of_pixels(pixel_values, plain=plain)

    # --- explanations ---

    def explain(self, image: Any, *, top_k: int | None = None, controls: Controls | None = None) -> Explanation:
        """Return the plain and the robust answer for one picture, and what the defense removed from it.

        Args:
            image: See `images.decode`.
            top_k: Only the best so many labels.
            controls: What of the defense is active; by default all of it.

        Raises:
            ConfigError: There is no defense to explain, or see `Controls`.
        """
        import torch

        check_top_k(top_k)
        decoded = images.decode(image, limits=self.limits)
        pixel_values = self.clip.preprocess(decoded.image)[None]
        prompts = self._chosen()
        text_embeds = self._embeds_of(prompts)
        with self._lock, torch.inference_mode():
            plain, plain_ms = self._timed(pixel_values, plain=True)
            with self._applied(controls) as attachment, attachment.recording() as told:
                robust, robust_ms = self._timed(pixel_values)
            removed, heatmap, fraction = account(told, attachment.grid_size)
        return Explanation(
            plain=prediction_of(prompts.labels, self.scores(plain, text_embeds)[0], top_k),
            robust=prediction_of(prompts.labels, self.scores(robust, text_embeds)[0], top_k),
            removed=removed,
            heatmap=heatmap,
            fraction=fraction,
            warnings=decoded.warnings,
            plain_ms=plain_ms,
            robust_ms=robust_ms,
            box=self.clip.preprocess.seen_box(*decoded.image.size),
            controls=controls or Controls(),
        )

    def _applied(self, controls: Controls | None) -> AbstractContextManager[AttachedDefense]:
        """Let the defense act as `controls` say, for as long as the context lasts; the caller holds the lock."""
        if self.defense is None:
            raise ConfigError("this classifier has no defense, so there is nothing to explain")
        self._own_process()
        return applied(self.clip, self.defense, controls, self._sae_of)

    def _timed(self, pixel_values: np.ndarray, *, plain: bool = False) -> tuple[np.ndarray, float]:
        """Return image_embeds and how long they took, in milliseconds."""
        start = time.perf_counter()
        image_embeds = self._encode_image(pixel_values, plain=plain)  # on the CPU: a GPU has been waited for
        return finite(image_embeds, "image_embeds"), 1000 * (time.perf_counter() - start)

    def classify_with(self, image: Any, controls: Controls, *, top_k: int | None = None) -> Prediction:
        """Return the answer for one picture under some `Controls`; cheaper than `explain`, and without an account.

        Args:
            image: See `images.decode`.
            controls: What of the defense is active.
            top_k: Only the best so many labels.

        Raises:
            ConfigError: There is no defense to adjust, or see `Controls`.
        """
        check_top_k(top_k)
        probe = self.probe(image)
        return prediction_of(probe.labels, probe.scores(controls), top_k)

    def probe(self, image: Any) -> Probe:
        """Return a picture that is decoded, resized and normalized, to be classified under many `Controls`.

        Args:
            image: See `images.decode`.

        Raises:
            ConfigError: No labels are set.
        """
        prompts = self._chosen()
        pixels = self._prepare(image)
        NoteLog().add("the picture", pixels.warnings)
        return Probe(self, prompts.labels, self._embeds_of(prompts), np.asarray(pixels)[None])

    def latent_map(self, image: Any, hook_point: str, latent: int) -> np.ndarray:
        """Return a latent's activation at each patch of a picture in the plain network, float32 [rows, columns].

        Args:
            image: See `images.decode`.
            hook_point: One of the defense's.
            latent: Any of the SAE there; of a slim defense any that it edits.

        Raises:
            ConfigError: There is no such latent, or a slim defense does not hold it; or see `sae`.
            InvalidImageError: The picture cannot be read.
        """
        self._own_process()
        with self._lock:  # another thread's pass would undo the bypass
            return self.clip.latent_map(hook_point, self.sae(hook_point), latent, image)

    def sae(self, hook_point: str) -> SparseAutoencoder:
        """Return the SAE at a hook point of the defense, on the model's device; of a slim one, what it holds of it.

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
                self._saes[id(site)] = sae_of(site).to(self.clip.device)
            return self._saes[id(site)]


class Probe:
    """A prepared picture and the labels that were set at that time: what `RobustClassifier.probe` returns.

    Attributes:
        labels: What the picture is classified into, in the order of the scores.
        text_embeds: Of the labels, float32 [n_labels, d_embed], normalized.
    """

    def __init__(
        self, clf: RobustClassifier, labels: tuple[str, ...], text_embeds: np.ndarray, pixel_values: np.ndarray
    ) -> None:
        self.labels, self.text_embeds = labels, text_embeds
        self._clf, self._pixel_values = clf, pixel_values

    def scores(self, controls: Controls) -> np.ndarray:
        """Return scores, float32 [n_labels], with the defense as `controls` say.

        Raises:
            ConfigError: There is no defense, or see `Controls.applied_to`.
        """
        image_embeds = self._clf._encode_image(self._pixel_values, controls=controls)
        scores: np.ndarray = self._clf.scores(image_embeds, self.text_embeds)[0]
        return scores

    def suppressions(self, controls: Controls) -> dict[str, Suppression]:
        """Return what the defense does to the picture at each hook point, as `controls` say.

        Raises:
            ConfigError: There is no defense, or see `Controls.applied_to`.
        """
        with self._clf._lock, self._clf._applied(controls) as attachment, attachment.recording() as told:
            self._clf._encode_image(self._pixel_values)
        return told

    @contextmanager
    def inside(self, controls: Controls | None) -> Iterator[tuple[Clip, np.ndarray]]:
        """Yield the CLIP and pixel_values [1, 3, height, width], to look inside; no other thread uses it meanwhile.

        Args:
            controls: What of the defense is active; nothing where None.

        Raises:
            ConfigError: See `scores`.
        """
        self._clf._own_process()
        with self._clf._lock, self._clf.clip.undefended() if controls is None else self._clf._applied(controls):
            yield self._clf.clip, self._pixel_values
