"""A training from its first step to a checkpoint: resumed, measured, reported."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from defense.core.config import Tokens
from defense.core.sae import SparseAutoencoder
from defense.errors import ConfigError, ShapeError
from defense.hosts.defense import ClipId
from defense.store.checkpoint import Checkpoint
from defense.store.folders import restore

from .parallel import World
from .quality import class_embeds, evaluate
from .residuals import Batches, Shards, Source, Stream, write_shards
from .trainer import BatchSource, Progress, SavedState, TrainConfig, Trainer

log = logging.getLogger(__name__)

_N_SAMPLE = 8192
"""Tokens that decide the scale and the start of b_dec."""
_ALONE = World()
_REPORT_EVERY = 10
_LOG_EVERY = 250


def train(
    source: Source,
    config: TrainConfig,
    *,
    tokens: Tokens = "all",
    device: torch.device | str = "cpu",
    world: World = _ALONE,
    state: Path | None = None,
    save_every: int = 500,
    report: Callable[[Progress], None] | None = None,
) -> SparseAutoencoder:
    """Return an SAE trained on a source of residuals.

    Args:
        source: `residuals.Stream` or `residuals.Shards`.
        config: How to train.
        tokens: Which tokens its residuals are; recorded in the SAE.
        device: Where to train.
        world: The processes that share each batch.
        state: File to save the training in, and to go on from where it exists. It stays, at the last step: delete it
            when what comes of it is safe.
        save_every: Steps between two saves.
        report: Called every few steps, by every process.

    Raises:
        ConfigError: Less than a batch of tokens, `state` is of another training, or the training diverges.
        CheckpointError: `state` is damaged.
    """
    made_with = {**{f"train.{key}": value for key, value in asdict(config).items()}, **source.describe()}
    saved = None if state is None else SavedState.read(state, made_with)
    batches = Batches(
        source, config.batch, seed=config.seed, world=world, state=None if saved is None else saved.batches
    )
    trainer = Trainer(config, source.d_model, torch.device(device), world)
    if saved is None:
        trainer.start(batches.sample(_N_SAMPLE).to(device))
    else:
        trainer.restore(saved)
        log.info("going on at step %d of %d", trainer.step, config.steps)

    def save() -> None:
        is_due = trainer.step % save_every == 0 or trainer.step == config.steps
        if state is not None and world.is_first and is_due:
            trainer.save(state, made_with, batches.state())

    return _run(trainer, batches, tokens, report, save)


def train_in_memory(resid: Tensor, config: TrainConfig, *, tokens: Tokens = "all") -> SparseAutoencoder:
    """Return an SAE trained on residuals [n, d_model].

    Args:
        resid: Float tensor; drawn with replacement, by the seed alone.
        config: How to train.
        tokens: Which tokens these are: "cls", "patch" or "all"; recorded in the SAE.

    Raises:
        ShapeError: `resid` is not two-dimensional.
        ConfigError: Fewer tokens than one batch.
    """
    if resid.ndim != 2:
        raise ShapeError(f"resid is {list(resid.shape)}; it must be [n, d_model], one row per token")
    if len(resid) < config.batch:
        raise ConfigError(f"{len(resid)} tokens, batch={config.batch}; it takes at least one batch of tokens")
    batches = InMemory(resid, config)
    trainer = Trainer(config, resid.shape[1], resid.device, World())
    trainer.start(batches.sample(_N_SAMPLE))
    return _run(trainer, batches, tokens)


class InMemory:
    """Rows of one tensor, drawn with replacement."""

    def __init__(self, resid: Tensor, config: TrainConfig) -> None:
        self.resid, self.batch = resid, config.batch
        self.generator = torch.Generator().manual_seed(config.seed)

    def sample(self, n: int) -> Tensor:
        return self.resid[torch.randperm(len(self.resid), generator=self.generator)[:n]].float()

    def next(self) -> Tensor:
        return self.resid[torch.randint(len(self.resid), (self.batch,), generator=self.generator)].float()

    def state(self) -> dict[str, Any]:
        raise NotImplementedError("a training in memory is not saved")


def _run(
    trainer: Trainer,
    batches: BatchSource,
    tokens: Tokens,
    report: Callable[[Progress], None] | None = None,
    save: Callable[[], None] = lambda: None,
) -> SparseAutoencoder:
    """Take the steps that are left; report and save on the way."""
    config = trainer.config
    while trainer.step < config.steps:
        loss = trainer.update(batches.next().to(trainer.silent_for.device))
        save()
        is_told = report is not None and (trainer.step % _REPORT_EVERY == 0 or trainer.step == config.steps)
        if is_told or trainer.step % _LOG_EVERY == 0:
            trainer.check_finite()
            progress = Progress(trainer.step, float(trainer.world.sum(loss)), int(trainer.dead.sum()))
            if report is not None and is_told:
                report(progress)
            if trainer.step % _LOG_EVERY == 0:
                log.info(
                    "SAE step %d of %d: loss %.4f, %d dead", progress.step, config.steps, progress.loss, progress.n_dead
                )
    return trainer.finish(batches, tokens)


def train_checkpoint(
    stream: Stream,
    config: TrainConfig,
    clip_id: ClipId,
    *,
    names: Sequence[str] = (),
    n_held_out: int = 1000,
    shards: Path | None = None,
    state: Path | None = None,
    license: str = "not stated",
    report: Callable[[Progress], None] | None = None,
) -> Checkpoint:
    """Train an SAE on pictures, measure it, and return it in the form that `checkpoint.save` writes.

    Args:
        stream: The pictures' residuals.
        config: How to train.
        clip_id: What identifies the CLIP.
        names: The classes of the pictures, to measure zero-shot accuracy with.
        n_held_out: Pictures to measure on.
        shards: Folder to keep the residuals in; where it exists, they are read from there.
        state: See `train`: it stays until what this returns is saved, which is the caller's.
        license: Of the SAE.
        report: See `train`.

    Raises:
        ConfigError: See `train`, `Shards` and `evaluate`.
        CheckpointError: `shards` or `state` is damaged.
    """
    # Now: what is wrong with the classes should not be found at the end.
    text_embeds = class_embeds(stream.clip, names)
    for picture in stream.pictures.held_out(n_held_out) if names else ():
        stream.pictures.class_of(picture, names)
    source: Source = stream
    if shards is not None:
        restore(shards)
        if not shards.exists():
            write_shards(stream, shards, config.steps * config.batch)
        source = Shards(shards, stream.describe(), stream.world)
    clip, hook_point = stream.clip, stream.hook_point
    sae = train(
        source, config, tokens=stream.tokens, device=clip.device, world=stream.world, state=state, report=report
    )
    quality, zero_shot = evaluate(
        clip, hook_point, sae, stream.pictures, n=n_held_out, names=tuple(names), text_embeds=text_embeds
    )
    provenance = {
        "host": asdict(clip_id),
        "activations": source.describe(),
        "train": asdict(config),
        "quality": asdict(quality),
        "zero_shot": None if zero_shot is None else asdict(zero_shot),
        "n_unreadable": len(stream.unreadable),
    }
    return Checkpoint(sae.cpu(), hook_point, clip_id.name, clip_id.quick_gelu, license, provenance)
