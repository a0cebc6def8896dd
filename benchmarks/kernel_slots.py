"""How many slots of the tokens' lists `_count_kernel` visits in a tile: what its time hangs on beside the matmul.

The kernel's way through the tiles is followed on a CPU, tile by tile, on random data and on the shipped defenses.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from unittest import mock

import torch
from torch import Tensor

from defense.benchmarks import kernel_cases
from defense.benchmarks.kernel_workloads import draw
from defense.core.ops.fused import Tile, topk
from defense.core.ops.reference import Encoder
from defense.core.sae import SparseAutoencoder, normalize
from defense.core.suppress import Suppressor

N_TOKENS = 1024
"""Tokens that are followed; more of them change the mean little."""
_N_PICTURES = 32
N_PROGRAMS = 132
"""That work at a time: one on each multiprocessor of an H200."""


@dataclass(frozen=True)
class Slots:
    """Visits of one encoder on some tokens.

    Attributes:
        data: What the tokens are.
        n_tokens: Tokens.
        n_firing: Tokens at which a latent of S has a positive pre-activation.
        all_slots: Mean number of slots visited in a tile, if none were skipped.
        slots: The same with decided ones skipped, as the kernel does it.
    """

    data: str
    n_tokens: int
    n_firing: int
    all_slots: float
    slots: float


def slots_per_tile(data: str, z: Tensor, encoder: Encoder, tile: Tile, token_tiles: int = N_PROGRAMS) -> Slots:
    """Return the visits of a TopK encoder on the tokens z [tokens, d_model].

    Args:
        data: What the tokens are, in words.
        z: Normalized residual, in any order.
        encoder: Of a TopK rule, with `b_others`.
        tile: How the product is cut up.
        token_tiles: Of the batch that these tokens stand for. Programs take the tiles in turn, token tiles fastest;
            those that work at the same time on one token do not see what the others find.
    """
    assert encoder.W_enc is not None
    assert encoder.b_others is not None
    acts = z @ encoder.W_S + encoder.b_S
    fires = acts > 0
    # Neighbors are tokens whose lists are about as long, as in `_order_kernel`.
    length = -(-fires.sum(1) * (topk._N_LENGTHS - 1) // fires.shape[1])
    order = length.argsort(descending=True, stable=True)[: int((length > 0).sum())]
    z, acts = z[order], acts[order]
    if not len(z):
        return Slots(data, len(fires), 0, 0.0, 0.0)
    acts = acts.where(acts > 0, torch.inf).sort(dim=1).values  # rising, inf past the end of a list
    counts = _larger(acts.where(acts.isfinite(), -torch.inf).sort(dim=1).values, acts)
    begin = ((counts >= encoder.k) & acts.isfinite()).sum(1)
    n_groups = -(-len(z) // tile.m)
    past = deque([(counts, begin)], maxlen=-(-N_PROGRAMS // token_tiles))
    place = torch.arange(acts.shape[1])
    visits: list[Tensor] = []
    all_visits: list[Tensor] = []
    for latent_tile, start in enumerate(range(0, encoder.W_enc.shape[1], tile.n)):
        h = torch.addmm(encoder.b_others[start : start + tile.n], z, encoder.W_enc[:, start : start + tile.n])
        is_exceeded = h.amax(1)[:, None] > acts
        tiles = [latent_tile * token_tiles + group * token_tiles // n_groups for group in range(n_groups)]
        n_unseen = [each % N_PROGRAMS // token_tiles for each in tiles]
        seen_counts, seen_begin = (
            torch.cat([state.split(tile.m)[group] for group, state in enumerate(states)])
            for states in zip(*(past[min(n, len(past) - 1)] for n in n_unseen), strict=True)
        )
        is_visited = is_exceeded & (place >= seen_begin[:, None])
        visits.append(_largest_of_each(is_visited.sum(1), tile.m))
        all_visits.append(_largest_of_each(is_exceeded.sum(1), tile.m))
        counts = counts + _larger(h.sort(dim=1).values, acts) * is_visited
        decided = ((is_visited & (seen_counts >= encoder.k)) * (place + 1)).amax(1)
        begin = torch.maximum(begin, decided)
        past.appendleft((counts, begin))
    mean = (float(torch.cat(each).double().mean()) for each in (all_visits, visits))
    return Slots(data, len(fires), len(z), *mean)


def _larger(rising: Tensor, acts: Tensor) -> Tensor:
    """Return how many of each row's rising values are larger than each of its acts."""
    return rising.shape[1] - torch.searchsorted(rising, acts, right=True)


def _largest_of_each(visits: Tensor, n: int) -> Tensor:
    """Return the largest of every n neighbors: a tile goes on as long as one of its tokens does."""
    return torch.stack([some.amax() for some in visits.split(n)])


def of_workloads(tile: Tile) -> list[Slots]:
    """Return the visits on the benchmark's own data, every token firing, for each shape."""
    found = []
    for case in kernel_cases.CASES:
        some = replace(case, batch=-(-N_TOKENS // case.pos))
        with mock.patch.object(kernel_cases, "DEVICE", "cpu"):
            workload = draw(some, torch.float32, kernel_cases.DEFAULT_SET, 1.0)
        z = normalize(workload.rows[:N_TOKENS], workload.norm).z
        token_tiles = -(-case.n_tokens // tile.m)
        found.append(slots_per_tile(f"{case.model}, random", z, workload.encoder, tile, token_tiles))
    return found


def of_defenses(tile: Tile) -> list[Slots]:
    """Return the visits of each site of the embedded defenses, on pictures of what each is against.

    Raises:
        MissingDependencyError: open_clip is not installed.
    """
    from defense.embedded.build import task_data
    from defense.fit.material import Pairs
    from defense.hosts.clip import EMBEDDED, embedded_folder, load_clip
    from defense.hosts.shipped import MODELS
    from defense.hosts.slim import restored
    from defense.store import checkpoint, defenses
    from defense.world.scenes import TEST_FONTS

    token_tiles = -(-kernel_cases.CASES[0].n_tokens // tile.m)
    clip, saes = load_clip(EMBEDDED), [each.sae for each in checkpoint.shipped_saes(MODELS[EMBEDDED])]
    found = []
    for name in MODELS[EMBEDDED].defenses:
        data, _ = task_data(name, _N_PICTURES, kernel_cases.SEED, TEST_FONTS, clip)
        pixel_values = data.attacked if isinstance(data, Pairs) else data.pixel_values
        # As it was fitted, with the TopK rule for which calibrated thresholds stand in.
        for site in restored(defenses.load(embedded_folder(name)), saes, own_rule=True).sites:
            sae = SparseAutoencoder(site.sae_config, dict(site.parameters))
            resid = clip.tower.resid(pixel_values, site.hook_point)
            z = normalize(resid.flatten(0, 1)[:N_TOKENS].float(), sae.config.norm).z
            for latent_set in site.sets:
                encoder = Suppressor(sae, latent_set, backend="reference").encoder()
                what = f"embedded:{name}, {site.hook_point.removesuffix('.hook_resid_post')}"
                found.append(slots_per_tile(what, z, encoder, tile, token_tiles))
    return found
