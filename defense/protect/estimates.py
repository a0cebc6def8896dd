"""What a fit or a training would take on this machine, measured for some seconds rather than known."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from defense.core.sae import SparseAutoencoder
from defense.data.sources import START, Pictures
from defense.fit.config import FitConfig
from defense.hosts.clip import Clip
from defense.hosts.tower import block_of
from defense.store.hub import in_words
from defense.store.registry import TrainSettings
from defense.train.parallel import World
from defense.train.residuals import Stream
from defense.train.trainer import TrainConfig, Trainer

_KINDS = 3
"""Pictures that a text fit looks at per picture: plain, with the plate, with the word."""
_BACKWARD = 3
"""A pass with gradients takes about as long as so many without."""
_BATCH = 8
_SLACK = 2
"""Disk that a training takes while it saves itself, in copies of what is saved."""


@dataclass(frozen=True)
class FitCost:
    """What a fit would take at most.

    Attributes:
        seconds: All of it.
        host_s: Of these, for encoding every picture once.
        sae_s: For the SAE on every token.
        joint_s: For the joint step, with every fold.
    """

    seconds: float
    host_s: float
    sae_s: float
    joint_s: float

    def __str__(self) -> str:
        parts = f"host {duration(self.host_s)}, SAE {duration(self.sae_s)}, joint step {duration(self.joint_s)}"
        return f"about {duration(self.seconds)} at most ({parts})"


@dataclass(frozen=True)
class TrainCost:
    """What the training of an SAE would take.

    Attributes:
        n_tokens: Tokens to train on.
        host_rate: Tokens per second that the CLIP gives, pictures decoded.
        train_rate: Tokens per second that the SAE is trained on.
        n_bytes: Disk, for the SAE and for the state of the training.
    """

    n_tokens: int
    host_rate: float
    train_rate: float
    n_bytes: int

    @property
    def rate(self) -> float:
        """Tokens per second of both, one after the other."""
        return 1 / (1 / self.host_rate + 1 / self.train_rate)

    @property
    def seconds(self) -> float:
        """How long it would take."""
        return self.n_tokens / self.rate

    def __str__(self) -> str:
        return (
            f"about {duration(self.seconds)} for {self.n_tokens:,} tokens at {self.rate:,.0f} a second on this machine "
            f"(CLIP {self.host_rate:,.0f}, SAE {self.train_rate:,.0f}), {in_words(self.n_bytes)} of disk"
        )


def duration(seconds: float) -> str:
    """Return a time in words, e.g. "12 min"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def fit_cost(
    clip: Clip,
    hook_point: str,
    sae: SparseAutoencoder,
    config: FitConfig,
    *,
    n_pictures: int,
    folds: int,
    seconds: float = 1.0,
) -> FitCost:
    """Return what a fit of a text defense at one block would take, from a few passes on blank pictures.

    Args:
        clip: The CLIP.
        hook_point: Where the SAE reads.
        sae: The SAE, on the CLIP's device.
        config: How latents are chosen.
        n_pictures: Pictures to fit on.
        folds: Of the cross-validation.
        seconds: How long to measure; at least one pass of each.
    """
    tower = clip.tower
    pixel_values = np.zeros((_BATCH, 3, *tower.image_size), np.float32)
    per_picture = _timed(lambda: clip.image_embeds(pixel_values), seconds / 2) / _BATCH
    rows = tower.resid(pixel_values, hook_point, sae.config.tokens).flatten(0, 1)
    with torch.inference_mode():
        per_sae = _timed(lambda: sae.encode(rows), seconds / 2) / _BATCH
    behind = (len(tower.blocks) - 1 - block_of(hook_point)) / len(tower.blocks)
    host_s = per_picture * _KINDS * n_pictures
    sae_s = per_sae * _KINDS * n_pictures * (1 + folds)
    tail = per_picture * max(behind, 0.5 / len(tower.blocks))  # behind the last block the head is left
    joint_s = tail * _BACKWARD * config.steps * config.batch * _KINDS * (1 + folds)
    return FitCost(host_s + sae_s + joint_s, host_s, sae_s, joint_s)


def train_config(settings: TrainSettings, d_model: int) -> TrainConfig:
    """Return how an SAE is trained for a tower of a width."""
    return TrainConfig(
        d_sae=settings.d_sae or 16 * d_model,
        k=settings.k,
        steps=-(-settings.n_tokens // settings.batch),
        batch=settings.batch,
        variant=settings.variant,  # type: ignore[arg-type]  # TrainConfig refuses another one
    )


def train_block(settings: TrainSettings, n_blocks: int) -> int:
    """Return after which block an SAE is trained: the stated one, else three quarters of the way through."""
    return 3 * n_blocks // 4 if settings.block is None else settings.block


def train_cost(clip: Clip, pictures: Pictures, settings: TrainSettings, *, seconds: float = 10.0) -> TrainCost:
    """Return what the training of an SAE would take, from doing it for some seconds.

    Args:
        clip: The CLIP.
        pictures: Pictures of the kind to train on.
        settings: How to train.
        seconds: How long to measure; at least a step of each.

    Raises:
        ConfigError: Settings that cannot work.
        HookPointError: No such block.
    """
    tower = clip.tower
    hook_point = f"blocks.{train_block(settings, len(tower.blocks))}.hook_resid_post"
    tokens = settings.tokens
    n_tokens = tower.n_tokens(hook_point, tokens)  # type: ignore[arg-type]  # the tower refuses another one
    stream = Stream(clip, hook_point, pictures, tokens=tokens, buffer=32 * n_tokens, text_rate=settings.text_rate)  # type: ignore[arg-type]
    position = START
    n_rows, spent = 0, 0.0
    while spent < seconds / 2:
        start = time.perf_counter()
        chunk = stream.chunk(position)
        spent += time.perf_counter() - start
        n_rows, position = n_rows + len(chunk.resid), chunk.next
    config = train_config(settings, tower.d_model)
    trainer = Trainer(replace(config, steps=10**9), tower.d_model, clip.device, World())
    rows = chunk.resid[torch.randint(len(chunk.resid), (config.batch,))].to(clip.device)
    trainer.start(rows)
    per_step = _timed(lambda: trainer.update(rows), seconds / 2)
    n_weights = 2 * tower.d_model * config.d_sae
    n_bytes = 4 * n_weights * (1 + _SLACK * 3)  # the SAE; weights and Adam's two moments of them
    return TrainCost(settings.n_tokens, n_rows / spent, config.batch / per_step, n_bytes)


def _timed(run: Callable[[], object], seconds: float) -> float:
    """Return how long a call takes, the median over some seconds after one that does not count."""
    run()
    took: list[float] = []
    while not took or sum(took) < seconds:
        start = time.perf_counter()
        result = run()
        if isinstance(result, torch.Tensor):
            result.cpu()  # a GPU has been waited for
        took.append(time.perf_counter() - start)
    return _median(took)


def _median(values: Sequence[float]) -> float:
    return float(np.median(values))
