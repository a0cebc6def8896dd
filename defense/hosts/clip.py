"""A CLIP that can embed, give and take its residual, and be defended for a while; and how one is loaded.

Importing this loads no torch: bundles are served where there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from defense.data.images import decode
from defense.data.labels import Prompts, encode_prompts
from defense.data.preprocess import Preprocess
from defense.data.tokenizer import ClipTokenizer
from defense.errors import BackendError, ConfigError, cannot_import

from .defense import ClipId, Defense, Site

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from defense.core.ops import Backend
    from defense.core.sae import SparseAutoencoder

    from .attach import AttachedDefense
    from .tower import VisionTower

EMBEDDED = "embedded"


@dataclass(frozen=True)
class Clip:
    """A CLIP: its model, and what prepares its inputs.

    Attributes:
        model: An open_clip model, in eval mode. Its own classes carry no types.
        preprocess: From a picture to pixel_values.
        tokenizer: From texts to token ids.
    """

    model: Any
    preprocess: Preprocess
    tokenizer: Callable[[list[str]], Any]

    @cached_property
    def tower(self) -> VisionTower:
        """The vision tower: blocks, device, dtype, and the ways into and out of the residual stream.

        Raises:
            ConfigError: The model has none.
            HookPointError: It has no transformer blocks.
        """
        from .families import tower_of

        return tower_of(self.model)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self.model.logit_scale.device
        return device

    @property
    def logit_scale(self) -> float:
        """Factor between cosines and logits."""
        return float(self.model.logit_scale.detach().float().exp())

    def image_embeds(self, pixel_values: np.ndarray | Tensor) -> Tensor:
        """Return image_embeds, float32 [batch, d_embed], normalized, on the model's device.

        A defense that is attached is at work.

        Args:
            pixel_values: As `preprocess` makes them, float [batch, 3, height, width], all at once.
        """
        import torch

        with torch.no_grad():
            embeds = self.tower.encode(self.tower.batch(pixel_values))
            return torch.nn.functional.normalize(embeds.float(), dim=-1)

    def encode_text(self, input_ids: np.ndarray) -> np.ndarray:
        """Return the text tower's answer, float32 [n, d_embed], not normalized, to ids int64 [n, context_length]."""
        import torch

        with torch.inference_mode():
            embeds: Tensor = self.model.encode_text(torch.from_numpy(input_ids).to(self.device))
            return embeds.float().cpu().numpy()

    def text_embeds(self, prompts: Prompts, *, normalize_each: bool = True) -> np.ndarray:
        """Return text_embeds, float32 [n_labels, d_embed], normalized; see `labels.encode_prompts`."""
        return encode_prompts(prompts, self.tokenizer, self.encode_text, normalize_each=normalize_each)

    def blank_tokens(self) -> np.ndarray | None:
        """Return for each token id whether the text tower has no embedding for it, bool [vocabulary]; None unknown."""
        table = getattr(self.model, "token_embedding", None)
        if table is None:
            return None
        is_blank: np.ndarray = (table.weight == 0).all(1).cpu().numpy()
        is_blank[0] = False  # padding
        return is_blank

    def id_as(self, model: str, pretrained: str | None = None) -> ClipId:
        """Return what identifies this CLIP on disk; `model` and `pretrained` are what it was loaded by."""
        tower = self.tower
        return ClipId(model, pretrained, tower.fingerprint(), tower.quick_gelu, tower.d_model, len(tower.blocks))

    @contextmanager
    def defended(
        self, defense: Defense, *, allow_mismatch: bool = False, backend: Backend = "auto"
    ) -> Iterator[AttachedDefense]:
        """Defend the model for as long as the context lasts; after it, it is bit for bit what it was.

        Args:
            defense: What to edit.
            allow_mismatch: See `wrap`.
            backend: See `wrap`.

        Raises:
            ConfigError, ShapeError, HookPointError, BackendError: See `wrap`.
        """
        from .attach import attached, detach, wrap

        wrap(self.model, defense, allow_mismatch=allow_mismatch, backend=backend)
        try:
            yield attached(self.model)
        finally:
            detach(self.model)

    @contextmanager
    def edited(self, sites: Sequence[Site]) -> Iterator[None]:
        """As `defended`, by sites that are no defense yet; without any, nothing is edited."""
        from .attach import attach, detach

        if not sites:
            yield
            return
        attach(self.model, sites)
        try:
            yield
        finally:
            detach(self.model)

    @contextmanager
    def undefended(self) -> Iterator[None]:
        """Let a defense that is attached pass everything unedited, for as long as the context lasts."""
        from .attach import attached, is_wrapped

        with attached(self.model).bypassed() if is_wrapped(self.model) else nullcontext():
            yield

    def latent_map(self, hook_point: str, sae: SparseAutoencoder, latent: int, image: Any) -> np.ndarray:
        """Return a latent's activation at each patch of a picture in the plain network, float32 [rows, columns].

        Not while another thread uses the model.

        Args:
            hook_point: Where the SAE reads.
            sae: The SAE.
            latent: Which latent.
            image: What `images.decode` takes.

        Raises:
            ConfigError: There is no such latent.
            InvalidImageError: The picture cannot be read.
        """
        import torch

        if not 0 <= latent < sae.config.d_sae:
            raise ConfigError(f"there is no latent {latent}; this SAE has latents 0 to {sae.config.d_sae - 1}")
        pixel_values = self.preprocess(decode(image).image)[None]
        with torch.inference_mode(), self.undefended():
            resid = self.tower.resid(pixel_values, hook_point)[0]
            acts = sae.encode(resid[self.tower.n_prefix :])[:, latent]
        return acts.reshape(self.tower.grid_size).float().cpu().numpy()


def load_clip(
    model: str = EMBEDDED, pretrained: str | None = None, *, device: str | int | torch.device = "cpu"
) -> Clip:
    """Load a CLIP through open_clip.

    Args:
        model: "embedded", or whatever open_clip takes: a name such as "ViT-B-32", "hf-hub:org/repo", "local-dir:path".
        pretrained: open_clip's tag or a path, for a plain name. A tag that is not cached is downloaded.
        device: See `resolve_device`.

    Raises:
        MissingDependencyError: torch or open_clip is not installed; or transformers, which the tokenizer is of.
        BackendError: One of them is there and cannot be imported; or see `resolve_device`.
        ConfigError: A plain name without `pretrained`, or one that open_clip does not know.
    """
    try:
        import open_clip
    except (ImportError, OSError) as error:  # OSError: a library that torch links to is not there
        raise cannot_import("torch", error) from error
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
        try:
            tokenizer = open_clip.get_tokenizer(model)
        except ImportError as error:
            raise cannot_import("transformers", error) from error
    else:
        tokenizer = ClipTokenizer(text_cfg.get("context_length", 77))
    preprocess = Preprocess.from_open_clip(open_clip.get_model_preprocess_cfg(net))
    return Clip(net.eval().requires_grad_(False), preprocess, tokenizer)


def resolve_device(device: str | int | torch.device) -> str:
    """Return the name of a torch device that is there.

    Args:
        device: "auto" (a GPU where there is one), a name such as "cpu" or "cuda:1", a `torch.device`, or the number of
            a GPU.

    Raises:
        ConfigError: It is none of these.
        BackendError: It was asked for and is not there.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if isinstance(device, bool) or not isinstance(device, (str, int, torch.device)):
            raise TypeError(f"a {type(device).__name__} is no device")
        found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        if found.type == "meta":
            raise TypeError("it computes nothing")
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"device={device!r} is no device of torch; give 'auto', 'cpu', 'cuda', 'cuda:1', a torch.device, or the "
            "number of a GPU"
        ) from error
    if found.type == "cuda" and not (found.index or 0) < torch.cuda.device_count():
        raise BackendError(
            f"device={device!r} was asked for, but torch {torch.__version__} sees {torch.cuda.device_count() or 'no'} "
            "CUDA device(s); use 'cpu'" + (", or one of the first" if torch.cuda.device_count() else "")
        )
    try:
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError, AttributeError) as error:
        raise BackendError(
            f"device={device!r} was asked for, but torch {torch.__version__} cannot use it; use 'cpu'"
        ) from error
    return str(found)


def embedded_folder(name: str) -> Path:
    """Return a folder of the embedded model: "clip", or the name of one of its defenses."""
    return Path(str(resources.files("defense.embedded").joinpath(name)))
