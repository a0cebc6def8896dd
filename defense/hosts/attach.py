"""The drop-in: the same model of open_clip, timm or transformers, with its vision tower defended.

    wrap(model, defense)      what the model makes of pictures is defended from here on
    detach(model)             and is bit for bit what it was

State-dict keys do not change, `.to()`, `.half()` and `.cuda()` reach the suppressors, and the model is still the
object that the caller had.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from defense.core.latents import LatentSet
from defense.core.ops import Backend
from defense.core.sae import SparseAutoencoder
from defense.core.suppress import Suppression, Suppressor, suppress, suppress_and_tell
from defense.data.preprocess import Preprocess
from defense.errors import ConfigError

from . import shipped
from .defense import ClipId, Defense, Site
from .families import check_module, tower_of
from .tower import VisionTower
from .transformers_inputs import preprocess_of
from .weights import WeightGuard

Model = TypeVar("Model", bound=nn.Module)

ATTRIBUTE = "defense"
"""Name of the submodule that `wrap` adds to a model."""


@dataclass(frozen=True)
class _Mode:
    """How a defense acts for one caller: a thread or an asyncio task sees its own, and no other's."""

    is_bypassed: bool = False
    stand_ins: Mapping[str, Sequence[Suppressor]] | None = None
    record: dict[str, Suppression] | None = None


_AS_ATTACHED = _Mode()


@dataclass(eq=False)
class _Change:
    """What a context changes, for as long as it lasts.

    Attributes:
        blocks: `id` of each `EditedBlock` that it is about.
        fields: Of their `_Mode`.
        is_over: Whether the context has been left, wherever: generators that share a caller are closed in any order,
            and by any thread.
    """

    blocks: frozenset[int]
    fields: Mapping[str, Any]
    is_over: bool = False


_changes: ContextVar[tuple[_Change, ...]] = ContextVar("defense modes", default=())
"""Of this caller, in the order in which its contexts were entered."""


_counting = threading.Lock()
_CANNOT_LOOK = (
    "bypassed, adjusted or recording of this defense last, which one graph cannot look at: compile without "
    "fullgraph=True, or use set_strength(0) for stock CLIP"
)


class EditedBlock(nn.Module):
    """The suppressors of one block and the hook that runs them."""

    def __init__(self, hook_point: str, suppressors: list[Suppressor], tower: VisionTower) -> None:
        super().__init__()
        self.hook_point = hook_point
        self.suppressors = nn.ModuleList(suppressors)
        self.n_prefix = tower.n_prefix
        self.batch_first = tower.batch_first
        self._handle: RemovableHandle | None = None
        self._n_changes = 0
        self._is_changed = False

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles take over: no context is about them."""
        return {**self.__dict__, "_n_changes": 0, "_is_changed": False}

    def hook_into(self, tower: VisionTower) -> None:
        """Put the hook on the block."""
        # A bound method: a deep copy of the model gets hooks that are bound to its own blocks. In front of other hooks:
        # transformers records hidden states by hooks, and what a LLaVA-type model reads is what was recorded.
        self._handle = tower.block(self.hook_point).register_forward_hook(self.hook, prepend=True)

    def mode(self) -> _Mode:
        """Return how the caller, a thread or an asyncio task, wants the block to act now."""
        if torch.compiler.is_dynamo_compiling():  # compiled code cannot look into a context
            if not self._is_changed:  # a guard: where it has changed, this is compiled anew
                return _AS_ATTACHED
            torch._dynamo.graph_break(msg=_CANNOT_LOOK)  # what follows is not compiled
        mode = _AS_ATTACHED
        for change in _changes.get():
            if id(self) in change.blocks and not change.is_over:
                mode = replace(mode, **change.fields)
        return mode

    def hook(self, _block: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Return the edited output of the block, in the block's own layout."""
        mode = self.mode()
        if mode.is_bypassed:
            return output
        resid = output if self.batch_first else output.transpose(0, 1)
        active = self.parts() if mode.stand_ins is None else mode.stand_ins.get(self.hook_point, ())
        if mode.record is None:
            edited = suppress(resid, active, self.n_prefix)
        else:
            mode.record[self.hook_point] = suppress_and_tell(resid, active, self.n_prefix)
            edited = mode.record[self.hook_point].edited
        return edited if self.batch_first else edited.transpose(0, 1)

    def count_changes(self, n: int) -> None:
        """Note that so many more contexts, of any caller, are about this block."""
        with _counting:
            self._n_changes += n
            self._is_changed = self._n_changes > 0

    def parts(self) -> list[Suppressor]:
        """Return the suppressors, typed."""
        return [part for part in self.suppressors if isinstance(part, Suppressor)]

    def remove(self) -> None:
        """Take the hook off the block."""
        if self._handle is not None:
            self._handle.remove()


class AttachedDefense(nn.Module):
    """What `wrap` adds to a model as `model.defense`.

    Args:
        tower: The vision tower.
        sites: What to edit there. A latent that several sets name at one site is edited once, by the first.
        backend: See `wrap`.
    """

    def __init__(self, tower: VisionTower, sites: Sequence[Site], backend: Backend = "auto") -> None:
        super().__init__()
        self.grid_size = tower.grid_size
        self.guard: WeightGuard | None = None
        self.backend: Backend = backend
        per_block = suppressors_of(tower, [(site.hook_point, sae_of(site), site.sets) for site in sites], backend)
        for hook_point in per_block:
            tower.block(hook_point)  # raises where there is no such block, before any hook is in place
        self.blocks = nn.ModuleList(EditedBlock(point, suppressors, tower) for point, suppressors in per_block.items())
        self.to(tower.device, tower.edit_dtype)
        for block in self.edited_blocks():  # last: whatever fails above leaves the model as it was
            block.hook_into(tower)

    def edited_blocks(self) -> list[EditedBlock]:
        """Return the blocks that are edited, in the order of the defense's sites."""
        return [block for block in self.blocks if isinstance(block, EditedBlock)]

    def suppressors(self) -> list[Suppressor]:
        """Return all suppressors."""
        return [suppressor for block in self.edited_blocks() for suppressor in block.parts()]

    def set_strength(self, strength: float, set_name: str | None = None) -> None:
        """Set how much is removed, in [0, 1], by one named set or by all. 0 is stock CLIP, bit for bit.

        Raises:
            ConfigError: No such set, or a strength outside [0, 1].
        """
        chosen = [s for s in self.suppressors() if set_name in (None, s.latent_set.name)]
        if not chosen and set_name is not None:
            raise ConfigError(f"this defense has no set {set_name!r}")
        for suppressor in chosen:
            suppressor.set_strength(strength)

    @contextmanager
    def bypassed(self) -> Iterator[None]:
        """Let the block pass unedited, at no cost.

        Where torch.compile was applied to what calls the model, its graph is broken at each block for as long as any
        caller's context lasts; with `fullgraph=True` it raises. `set_strength(0)` costs a compiled model nothing.
        """
        with self._acting(is_bypassed=True):
            yield

    @contextmanager
    def adjusted(self, suppressors: Mapping[str, Sequence[Suppressor]]) -> Iterator[None]:
        """Let other suppressors act in place of the blocks' own.

        Args:
            suppressors: By hook point; a block that is not named passes unedited. On the model's device, in its dtype.
        """
        with self._acting(stand_ins=suppressors):
            yield

    @contextmanager
    def recording(self) -> Iterator[dict[str, Suppression]]:
        """Yield what the suppressors of each block did last, by hook point: empty until the model has run."""
        record: dict[str, Suppression] = {}
        with self._acting(record=record):
            yield record

    @contextmanager
    def _acting(self, **changes: Any) -> Iterator[None]:
        """Change the mode of this caller, a thread or an asyncio task, for as long as the context lasts.

        Contexts nest, and those of several callers may overlap as they like: none undoes what another set.
        """
        blocks = self.edited_blocks()
        change = _Change(frozenset(map(id, blocks)), changes)
        for block in blocks:
            block.count_changes(1)
        _changes.set((*_lasting(), change))
        try:
            yield
        finally:
            change.is_over = True
            _changes.set(_lasting())
            for block in blocks:
                block.count_changes(-1)


def _lasting() -> tuple[_Change, ...]:
    """Return the changes of this caller whose contexts have not been left."""
    return tuple(change for change in _changes.get() if not change.is_over)


def sae_of(site: Site) -> SparseAutoencoder:
    """Return the autoencoder of a defense's site, in float32 on the CPU; of a slim one, what it holds of it.

    It shares the site's memory: whole SAEs are large.
    """
    held = None if site.part is None else site.part.latents
    return SparseAutoencoder(site.sae_config, dict(site.parameters), held, copy=False)


def suppressors_of(
    tower: VisionTower, sites: Iterable[tuple[str, SparseAutoencoder, Sequence[LatentSet]]], backend: Backend
) -> dict[str, list[Suppressor]]:
    """Return suppressors by hook point. A latent that several sets name at one site is edited once, by the first.

    Args:
        tower: The vision tower.
        sites: Hook point, SAE and sets of each.
        backend: See `wrap`.
    """
    per_block: dict[str, list[Suppressor]] = {}
    for hook_point, sae, sets in sites:
        tower.check_width(sae.config.d_model, f"the SAE at {hook_point}")
        taken: frozenset[int] = frozenset()
        for latent_set in sets:
            scope = tower.effective_scope(hook_point, latent_set.scope)
            suppressor = Suppressor(sae, latent_set.without(taken), scope, backend=backend)
            per_block.setdefault(hook_point, []).append(suppressor)
            taken |= set(latent_set.latents)
    return per_block


def check_clip(tower: VisionTower, spec: ClipId) -> None:
    """Hold a vision tower against the one that a defense was fitted on.

    Raises:
        ConfigError: Another architecture, another GELU, or other weights.
        ShapeError: Another width.
    """
    name = spec.name
    ours = shipped.find_model(spec.model)
    if ours is not None and not tower.has_weights(spec.sha256, spec.stream_sha256):
        raise ConfigError(shipped.fits_alone(ours))
    tower.check_width(spec.d_model, f"this defense (fitted on {name})")
    if len(tower.blocks) != spec.n_layers:
        raise ConfigError(
            f"this defense was fitted on {name} with {spec.n_layers} blocks; this tower has {len(tower.blocks)}"
        )
    if tower.quick_gelu != spec.quick_gelu:
        want, got = ("QuickGELU", "GELU") if spec.quick_gelu else ("GELU", "QuickGELU")
        raise ConfigError(
            f"this defense was fitted on {name} with {want}, but this model uses {got}; create it with "
            f"force_quick_gelu={spec.quick_gelu}, or under the name that ends in '-quickgelu'"
        )
    if tower.has_weights(spec.sha256, spec.stream_sha256):
        return
    own = tower.fingerprints()
    if tower.is_whole or spec.stream_sha256 is not None:
        want, got = (spec.sha256, own.whole) if tower.is_whole else (str(spec.stream_sha256), own.stream)
        raise ConfigError(
            f"this defense was fitted on the weights of {name} (sha256 {want[:16]}...); this model's vision tower is "
            f"{got[:16]}.... Load those weights (wrap before casting to bfloat16), or in Python pass "
            "allow_mismatch=True"
        )
    raise ConfigError(
        f"this vision tower is held without its projection, and this defense, fitted on {name}, names the weights only "
        "with it; save the defense again with the whole model's Clip.id_as, or in Python pass allow_mismatch=True"
    )


def check_preprocess(preprocess: Preprocess, defense: Defense) -> None:
    """Hold how pictures are prepared against how they were when a defense was fitted.

    Raises:
        ConfigError: It is another way.
    """
    if preprocess != defense.preprocess:
        raise ConfigError(
            f"this defense was fitted on pictures prepared with {defense.preprocess}, but these are prepared with "
            f"{preprocess}; use the same, or in Python pass allow_mismatch=True"
        )


def wrap(
    model: Model,
    defense: Defense,
    *,
    processor: Any = None,
    allow_mismatch: bool = False,
    backend: Backend = "auto",
) -> Model:
    """Put a defense into a model and return the same object.

    Attach before torch.compile: a hook that comes later is ignored by compiled code. Until `detach`, loading a state
    dict with other weights of the vision tower raises `ConfigError`, unless `allow_mismatch` was given.

    Args:
        model: A model of open_clip with a ViT, native or of timm; a ViT of timm; or of transformers a CLIP, SigLIP,
            SigLIP 2 or DINOv2, whole or the vision tower alone, or a LLaVA-type model that has one.
        defense: What to edit. Its CLIP may have been of another library, with the same weights.
        processor: What prepares the model's pictures, held against what the defense was fitted on: a processor or image
            processor of transformers, or a `Preprocess`.
        allow_mismatch: Skip the checks that this is the model the defense was fitted on; widths are still checked.
        backend: What computes the edit: "auto" takes the Triton kernels on a GPU where they apply; "fused" takes them
            or raises; "reference" is plain PyTorch.

    Raises:
        ConfigError: The model is compiled, wrapped already, or not the one that the defense was fitted on, its pictures
            are prepared in another way, or the backend is unknown.
        BackendError: `backend` is "fused", and there is no kernel for an SAE or edit of this defense. (Where it is the
            device that cannot run one, `encode_image` raises.)
        ShapeError: The SAE has another width than the model.
        HookPointError: The model has no such block, or an edit there, or of that scope, would do nothing.
    """
    check_module(model)
    if not isinstance(defense, Defense):
        raise ConfigError(
            f"defense is {defense!r:.80} of type {type(defense).__name__}; want a Defense, as find_defense(...) or "
            "defenses.load(...) returns it. RobustClassifier.from_pretrained(...) takes a name"
        )
    if is_compiled(model):
        raise ConfigError("this model is compiled, and would ignore the defense; wrap it first, then compile")
    if is_wrapped(model):
        raise ConfigError("this model is defended already; detach(model) first, or give one Defense with several sets")
    tower = tower_of(model)
    if not allow_mismatch:
        check_clip(tower, defense.clip)
        if processor is not None:
            check_preprocess(preprocess_of(processor), defense)
    attach(model, defense.sites, backend)
    if not allow_mismatch:
        attached(model).guard = WeightGuard(model, tower.parts)
    return model


def attach(model: nn.Module, sites: Sequence[Site], backend: Backend = "auto") -> None:
    """Put the edits of some sites into a model without asking what they were made for; `detach` takes them out."""
    model.add_module(ATTRIBUTE, AttachedDefense(tower_of(model), sites, backend))


def is_wrapped(model: nn.Module) -> bool:
    """Return whether a model holds a defense."""
    return hasattr(model, ATTRIBUTE)


def attached(model: nn.Module) -> AttachedDefense:
    """Return what `wrap` added to a model.

    Raises:
        ConfigError: The model is not wrapped.
    """
    found = getattr(model, ATTRIBUTE, None)
    if not isinstance(found, AttachedDefense):
        raise ConfigError("this model is not defended; call wrap(model, defense) first")
    return found


def detach(model: Model) -> Model:
    """Take the defense out of a model again and return it: outputs are bit-equal to those before `wrap`.

    Raises:
        ConfigError: The model is compiled or not wrapped.
    """
    if is_compiled(model):
        raise ConfigError("this model is compiled with the defense inside; set its strength to 0 instead of detaching")
    attachment = attached(model)
    for block in attachment.edited_blocks():
        block.remove()
    if attachment.guard is not None:
        attachment.guard.remove()
    delattr(model, ATTRIBUTE)
    return model


def check_switchable(model: nn.Module) -> None:
    """Refuse a context on a compiled model: its graph would be broken for it, or could not be.

    Raises:
        ConfigError: torch.compile was applied to the model or a part of it.
    """
    if is_compiled(model):
        raise ConfigError(
            "this model is compiled with the defense inside, which cannot be changed for one call (plain, explain, "
            "controls); use set_strength(0) for stock CLIP, or a copy that is not compiled"
        )


def is_compiled(model: nn.Module) -> bool:
    """Return whether torch.compile was applied to a model or a part of it, which then ignores new hooks."""
    return any(
        type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )
