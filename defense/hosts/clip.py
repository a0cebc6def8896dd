"""A CLIP that can embed, give and take its residual, and be defended for a while; and how one is loaded.

Importing this loads no torch: bundles are served where there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from defense.data.images import decode
from defense.data.labels import Prompts, encode_prompts
from defense.data.notes import NoteLog
from defense.data.preprocess import Preprocess
from defense.data.tokenizer import ClipTokenizer
from defense.errors import BackendError, ConfigError, cannot_import

from . import shipped
from .defense import ClipId, Defense, Site
from .shipped import EMBEDDED as EMBEDDED
from .shipped import embedded_folder as embedded_folder

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from defense.core.ops import Backend
    from defense.core.sae import SparseAutoencoder

    from .attach import AttachedDefense
    from .text import TextTower
    from .tower import VisionTower

TIMM = "timm:"
"""How the name of a vision transformer of timm begins that has no texts."""


def no_tokenizer(_texts: list[str]) -> Any:
    """Stand in for the tokenizer of a model that takes no texts.

    Raises:
        ConfigError: Always.
    """
    raise ConfigError(
        "there is no tokenizer: this model has no text tower, or came without its processor; take embeddings "
        "(transform), or a whole CLIP and its tokenizer"
    )


@dataclass(frozen=True)
class Clip:
    """A CLIP: its model, and what prepares its inputs. Or a vision transformer alone, which embeds pictures.

    Attributes:
        model: A model of open_clip, transformers or timm, in eval mode (see `wrap`). Their classes carry no types.
        preprocess: From a picture to pixel_values.
        tokenizer: From texts to token ids.
    """

    model: Any
    preprocess: Preprocess
    tokenizer: Callable[[list[str]], Any] = no_tokenizer

    @classmethod
    def from_transformers(cls, model: Any, processor: Any) -> Clip:
        """Return a CLIP around a model of transformers, which is put into eval mode.

        Args:
            model: CLIP, SigLIP, SigLIP 2 or DINOv2, whole or the vision tower alone; or a LLaVA-type model, of which
                the embedding is the mean of the tokens that its language model is given.
            processor: Its processor, whose tokenizer is the model's; or its image processor; or a `Preprocess` in
                place of one that there is none for.

        Raises:
            ConfigError: The model has no vision tower that is known here, or the processor does something that there is
                no `Preprocess` for.
        """
        from .transformers_inputs import preprocess_of, tokenizer_of
        from .transformers_vision import find_text

        has_texts = find_text(model) is not None
        tokenizer = tokenizer_of(processor, model.config.text_config.max_position_embeddings) if has_texts else None
        return cls(model.eval(), preprocess_of(processor), tokenizer or no_tokenizer)._checked()

    @classmethod
    def from_timm(cls, model: Any, preprocess: Preprocess | None = None) -> Clip:
        """Return what embeds pictures by a vision transformer of timm, which is put into eval mode.

        Args:
            model: The vision transformer.
            preprocess: How its pictures are prepared; by default as its `pretrained_cfg` says.

        Raises:
            ConfigError: It is none, or its `pretrained_cfg` says something that there is no `Preprocess` for.
        """
        from .timm_vit import preprocess_of

        return cls(model.eval(), preprocess or preprocess_of(model))._checked()

    def _checked(self) -> Clip:
        """Return itself, where it has a vision tower that takes what `preprocess` gives."""
        if self.tower.image_size != self.preprocess.size:
            raise ConfigError(
                f"this model takes pictures of {self.tower.image_size} pixels, and is given ones of "
                f"{self.preprocess.size}; use the processor that goes with it"
            )
        return self

    @cached_property
    def tower(self) -> VisionTower:
        """The vision tower: blocks, device, dtype, and the ways into and out of the residual stream.

        Raises:
            ConfigError: The model has none.
            HookPointError: It has no transformer blocks.
        """
        from .families import tower_of

        return tower_of(self.model)

    @cached_property
    def text_tower(self) -> TextTower:
        """The text tower.

        Raises:
            ConfigError: The model has none.
        """
        from .families import text_tower_of

        return text_tower_of(self.model)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.tower.device

    @property
    def logit_scale(self) -> float:
        """Factor between cosines and logits.

        Raises:
            ConfigError: The model has no texts, and so no logits.
        """
        if getattr(self.model, "logit_scale", None) is None:
            raise ConfigError(f"{type(self.model).__name__} compares no pictures with texts, so it has no logit_scale")
        return float(self.model.logit_scale.detach().float().exp())

    @property
    def logit_bias(self) -> float:
        """What is added to logits, the same for all labels: 0 for CLIP, learned for SigLIP."""
        bias = getattr(self.model, "logit_bias", None)
        return 0.0 if bias is None else float(bias.detach().float())

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
            embeds = self.text_tower.encode(torch.from_numpy(input_ids).to(self.device))
            return embeds.float().cpu().numpy()

    def text_embeds(self, prompts: Prompts, *, normalize_each: bool = True) -> np.ndarray:
        """Return text_embeds, float32 [n_labels, d_embed], normalized; see `labels.encode_prompts`.

        Raises:
            ConfigError: The model has no text tower.
        """
        self.text_tower  # noqa: B018 - raises for a model without one, which then has no tokenizer either
        return encode_prompts(prompts, self.tokenizer, self.encode_text, normalize_each=normalize_each)

    def blank_tokens(self) -> np.ndarray | None:
        """Return for each token id whether the text tower has no embedding for it, bool [vocabulary]; None unknown."""
        table = self.text_tower.table
        if table is None:
            return None
        weight: Any = table.weight
        is_blank: np.ndarray = (weight == 0).all(1).cpu().numpy()
        is_blank[0] = False  # padding
        return is_blank

    def id_as(self, model: str, pretrained: str | None = None) -> ClipId:
        """Return what identifies this CLIP on disk; `model` and `pretrained` are what it was loaded by."""
        from .open_clip_names import spelled

        tower, model = self.tower, spelled(model)
        whole, stream = tower.fingerprints()
        return ClipId(model, pretrained, whole, tower.quick_gelu, tower.d_model, len(tower.blocks), stream)

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
        """Let a defense that is attached pass everything unedited, for as long as the context lasts.

        Raises:
            ConfigError: The model is compiled with it.
        """
        from .attach import attached, check_switchable, is_wrapped

        if not is_wrapped(self.model):
            yield
            return
        check_switchable(self.model)
        with attached(self.model).bypassed():
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
            ConfigError: There is no such latent, or a slim defense does not hold it.
            InvalidImageError: The picture cannot be read.
        """
        import torch

        sae.columns([latent])
        decoded = decode(image)
        NoteLog().add("the picture", decoded.warnings)
        pixel_values = self.preprocess(decoded.image)[None]
        with torch.inference_mode(), self.undefended():
            resid = self.tower.resid(pixel_values, hook_point)[0]
            acts = sae.acts_of(resid[self.tower.n_prefix :], [latent])
        return acts.reshape(self.tower.grid_size).float().cpu().numpy()


def load_clip(
    model: str = shipped.DEFAULT, pretrained: str | None = None, *, device: str | int | torch.device = "cpu"
) -> Clip:
    """Load a CLIP by name.

    Args:
        model: "photo" or "embedded", which ship; a name of open_clip such as "ViT-B-32", also written "ViT-B/32";
            "hf-hub:org/repo" or "local-dir:path" of open_clip; "transformers:" with a folder or hub id; "timm:" with a
            name of timm, for embeddings alone.
        pretrained: open_clip's tag or a path, for a plain name. A tag that is not cached is downloaded.
        device: See `resolve_device`.

    Raises:
        MissingDependencyError: torch, open_clip, or for a name of it transformers is not installed.
        BackendError: One of them is there and cannot be imported; or see `resolve_device`.
        ConfigError: A plain name without `pretrained`, one that its library does not know, or weights that were not
            trained with the kind of GELU that the name asks for.
    """
    from .transformers_inputs import SCHEME, load

    try:
        import open_clip

        from . import photo_tower  # noqa: F401 - registers the tower, which a configuration may name
    except (ImportError, OSError) as error:  # OSError: a library that torch links to is not there
        raise cannot_import("torch", error) from error
    device = resolve_device(device)
    if model.startswith(SCHEME):
        net, processor = load(model.removeprefix(SCHEME))
        return Clip.from_transformers(net.to(device).requires_grad_(False), processor)
    if model.startswith(TIMM):
        return _load_timm(model.removeprefix(TIMM), device)
    ours = shipped.find_model(model)
    if ours is not None:
        shipped.check_there(ours)
        model = f"local-dir:{ours.folder('clip')}"
    needs_quick_gelu = False
    if not model.startswith(("hf-hub:", "local-dir:")):
        from . import open_clip_names

        model = open_clip_names.known_name(model)
        open_clip_names.check_weights(model, pretrained)
        needs_quick_gelu = open_clip_names.needs_quick_gelu(model, str(pretrained))
    try:
        net = open_clip.create_model(
            model, pretrained=pretrained, device=device, force_quick_gelu=needs_quick_gelu, weights_only=True
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise ConfigError(f"open_clip cannot load {model!r} (pretrained={pretrained!r}): {error}") from error
    config = open_clip.get_model_config(model)
    if config is None:
        raise ConfigError(f"open_clip gives no configuration of {model!r}, so its tokenizer is unknown")
    preprocess = Preprocess.from_open_clip(open_clip.get_model_preprocess_cfg(net))
    return Clip(net.eval().requires_grad_(False), preprocess, _open_clip_tokenizer(model, config["text_cfg"]))


def _open_clip_tokenizer(model: str, text_cfg: dict[str, Any]) -> Callable[[list[str]], Any]:
    """Return CLIP's own tokenizer, or the one of Hugging Face that a model names."""
    import open_clip

    if not (text_cfg.get("hf_tokenizer_name") or text_cfg.get("hf_model_name")):
        return ClipTokenizer(text_cfg.get("context_length", 77))
    try:
        tokenizer: Callable[[list[str]], Any] = open_clip.get_tokenizer(model)
    except (ImportError, NameError, AttributeError) as error:
        raise cannot_import("transformers", error) from error
    return tokenizer


def _load_timm(name: str, device: str) -> Clip:
    """Return a vision transformer of timm with its weights, for embeddings."""
    import timm

    try:
        net = timm.create_model(name, pretrained=True, num_classes=0)
    except (RuntimeError, ValueError, OSError) as error:
        raise ConfigError(f"timm cannot load {name!r}: {error}") from error
    return Clip.from_timm(net.to(device).requires_grad_(False))


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
