"""What the benchmark of speed runs on: a CLIP with random weights, random pictures, and random SAEs whose S fires.

The encoder biases of S are shifted until just the wanted share of tokens has a positive pre-activation in S.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from defense.benchmarks.firing import firing_bias, shares_to_time
from defense.benchmarks.speed_rows import Case
from defense.core.config import SAEConfig
from defense.core.latents import Edit, LatentSet
from defense.data.preprocess import Preprocess
from defense.errors import ConfigError, MissingDependencyError
from defense.hosts.families import tower_of

BASELINE_SHARE = 0.05
"""Share of firing tokens in the workload on which the slow variants are timed: they cost the same whatever fires."""
_EMPHASIS = 32.0
"""Length of the encoder columns of S; the others have length 1."""


@dataclass(frozen=True)
class Stage:
    """What all variants share.

    Attributes:
        case: What is measured.
        model: Plain CLIP, in eval mode.
        preprocess: How the model takes pictures; only their size counts here.
        pixel_values: Random pictures, [batch, 3, height, width].
        rows: The residual of these pictures at the case's hook point, [tokens, d_model].
    """

    case: Case
    model: nn.Module
    preprocess: Preprocess
    pixel_values: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Workload:
    """An SAE, its S and what is done to S.

    Attributes:
        config: Sizes and activation rule.
        parameters: W_enc, b_enc, W_dec and b_dec, float32.
        latent_set: S and the edit.
        share: Wanted share of tokens with a positive pre-activation in S.
    """

    config: SAEConfig
    parameters: Mapping[str, np.ndarray]
    latent_set: LatentSet
    share: float


def create_model(case: Case) -> nn.Module:
    """Return the case's open_clip model, with random weights that follow from its seed.

    Raises:
        MissingDependencyError: open_clip is not installed.
    """
    try:
        import open_clip
    except ImportError as error:
        raise MissingDependencyError(error.name or "open_clip", "torch") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)
        return open_clip.create_model(case.model, pretrained=None)


def set_stage(model: nn.Module, case: Case) -> Stage:
    """Return a model with random pictures and their residual, for which the SAEs are made.

    Args:
        model: A CLIP of open_clip; it is put into eval mode.
        case: Block, batch and seed.

    Raises:
        ConfigError: The block is the last one, whose patch tokens do not matter.
        HookPointError: There is no such block.
    """
    import open_clip

    tower = tower_of(model.eval())
    if tower.effective_scope(case.hook_point, "all") != "all":
        raise ConfigError(
            f"block={case.block} is the last of {case.model}; choose an earlier one, where every token counts"
        )
    preprocess = Preprocess.from_open_clip(open_clip.get_model_preprocess_cfg(model))
    generator = torch.Generator().manual_seed(case.seed)
    pixel_values = torch.randn(case.batch, 3, *preprocess.size, generator=generator)
    rows = tower.resid(pixel_values, case.hook_point).flatten(0, 1)
    return Stage(case, model, preprocess, pixel_values, rows)


def random_sae(stage: Stage, latents: np.ndarray) -> dict[str, np.ndarray]:
    """Return the parameters of an SAE of random directions around the mean residual.

    Args:
        stage: Sizes, seed and residual.
        latents: S; its encoder columns are longer than the others, so that TopK keeps most of those that fire. [n_set]
    """
    case, rows = stage.case, stage.rows.numpy()
    shape = (case.d_sae, rows.shape[1])
    directions = np.random.default_rng([case.seed, 1]).standard_normal(shape, dtype=np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    W_enc = np.ascontiguousarray(directions.T)
    W_enc[:, latents] *= _EMPHASIS
    return {"W_enc": W_enc, "b_enc": np.zeros(case.d_sae, np.float32), "W_dec": directions, "b_dec": rows.mean(0)}


def make_workloads(stage: Stage) -> list[Workload]:
    """Return the workloads to time: TopK with several shares of firing tokens, another edit, and ReLU.

    Their SAEs share W_enc, W_dec and b_dec, and differ in the activation rule and in b_enc.
    """
    case = stage.case
    latents = np.sort(np.random.default_rng([case.seed, 2]).choice(case.d_sae, case.n_set, replace=False))
    parameters = random_sae(stage, latents)
    centered = stage.rows.numpy().astype(np.float64) - parameters["b_dec"]
    peaks = (centered @ parameters["W_enc"][:, latents]).max(1)

    def workload(act: str, edit: Edit, share: float) -> Workload:
        b_enc = parameters["b_enc"].copy()
        b_enc[latents] = firing_bias(peaks, share)
        k = case.k if act == "topk" else None
        config = SAEConfig(d_model=centered.shape[1], d_sae=case.d_sae, act=act, k=k)  # type: ignore[arg-type]
        latent_set = LatentSet("benchmark", tuple(latents.tolist()), edit=edit)
        return Workload(config, {**parameters, "b_enc": b_enc}, latent_set, share)

    return [
        *(workload("topk", "scale", share) for share in shares_to_time()),
        workload("topk", "project", BASELINE_SHARE),
        workload("relu", "scale", 1.0),
    ]
