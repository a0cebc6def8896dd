"""How many tokens fire: on what share of them the shipped text defense does, and the bias that makes random ones do so.

    python -m defense.benchmarks.firing --out benchmarks/results/firing.json

A token *fires* if a latent of S has a positive pre-activation there. What a defense with a TopK rule costs depends on
how many do, so the benchmarks of speed shift the encoder biases of S until a wanted share fires: fixed ones, and those
that this file measures at each site of the text defense, with the TopK rule that its SAEs were trained with, on drawn
pictures with words on them that the fit did not see.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).with_name("results") / "firing.json"
_N_PICTURES = 200
_SEED = 0
_FIXED = (0.0, 0.05, 0.2, 1.0)


def firing_bias(peaks: np.ndarray, share: float) -> float:
    """Return the encoder bias, the same for all of S, with which just a share of tokens fires.

    Args:
        peaks: The largest pre-activation in S at each token, without a bias, [tokens].
        share: Wanted, in [0, 1]; rounded to whole tokens.
    """
    n_firing = round(share * len(peaks))
    slack = 0.05 * np.abs(peaks).max()
    falling = np.sort(peaks)[::-1]
    edges = np.concatenate([falling[:1] + slack, falling, falling[-1:] - slack])
    return -float(edges[n_firing : n_firing + 2].mean())


def shares_to_time(path: Path = RESULTS) -> tuple[float, ...]:
    """Return the shares of firing tokens to time, rising: 0, 5, 20 and 100 %, and those of the shipped text defense.

    Args:
        path: What `main` wrote; its shares are rounded to whole percents.
    """
    own = (round(site["n_firing"] / site["n_tokens"], 2) for site in json.loads(path.read_text("utf-8"))["sites"])
    return tuple(sorted({*_FIXED, *own}))


def measure() -> list[dict[str, Any]]:
    """Return the sites of the text defense: tokens, those that fire, and those at which a latent of S is kept."""
    import torch

    from defense.core.sae import SparseAutoencoder
    from defense.core.suppress import Suppressor
    from defense.embedded.build import task_data
    from defense.fit.material import Pairs
    from defense.hosts.clip import EMBEDDED, embedded_folder, load_clip
    from defense.hosts.shipped import MODELS
    from defense.hosts.slim import restored
    from defense.store import checkpoint, defenses
    from defense.world.scenes import TEST_FONTS

    clip, saes = load_clip(EMBEDDED), [each.sae for each in checkpoint.shipped_saes(MODELS[EMBEDDED])]
    data, _ = task_data("text", _N_PICTURES, _SEED, TEST_FONTS, clip)
    assert isinstance(data, Pairs)
    found = []
    for site in restored(defenses.load(embedded_folder("text")), saes, own_rule=True).sites:
        (latent_set,) = site.sets
        suppressor = Suppressor(SparseAutoencoder(site.sae_config, dict(site.parameters)), latent_set)
        with torch.inference_mode():
            rows = clip.tower.resid(data.attacked, site.hook_point).flatten(0, 1)
            fires, survives = (
                (each > 0).any(1) for each in (rows @ suppressor.W_S + suppressor.b_S, suppressor.acts(rows))
            )
        found.append({"site": site.hook_point, "n_tokens": len(rows), "n_firing": int(fires.sum()),
                      "n_surviving": int(survives.sum())})  # fmt: skip
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write or print."""
    from defense.benchmarks.environment import environment_of, write_json

    parser = argparse.ArgumentParser(
        prog="python -m defense.benchmarks.firing", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the result goes (default: %(default)s)")
    argv = sys.argv[1:] if argv is None else argv
    out = parser.parse_args(argv).out
    environment = environment_of(shlex.join(["python", "-m", "defense.benchmarks.firing", *argv]))
    result = {"environment": asdict(environment), "n_pictures": _N_PICTURES, "seed": _SEED, "sites": measure()}
    write_json(out, result)
    print(table(result), caption(result), sep="\n\n")
    return 0


def table(result: dict[str, Any]) -> str:
    """Return a result as a Markdown table."""
    lines = ["| site | tokens | firing | with a latent of S among the k largest |", "|---" * 4 + "|"]
    for site in result["sites"]:
        firing, surviving = (f"{100 * site[name] / site['n_tokens']:.1f} %" for name in ("n_firing", "n_surviving"))
        lines.append(f"| {site['site']} | {site['n_tokens']:,} | {firing} | {surviving} |")
    return "\n".join(lines)


def caption(result: dict[str, Any]) -> str:
    """Return what a reader of the table has to know."""
    return (
        f"The shipped text defense with the TopK rule of its SAEs, on {result['n_pictures']} drawn pictures with words "
        f"on them (unseen typefaces, seed {result['seed']}). As it ships, calibrated, it has no TopK rule, and "
        "its cost does not depend on what fires."
    )


if __name__ == "__main__":
    sys.exit(main())
