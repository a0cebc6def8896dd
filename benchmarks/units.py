"""Are latents more than neurons, channels and random directions? Steerability and monosemanticity of all four.

    python -m defense.benchmarks.units --out benchmarks/results/units.json

On the embedded model, at each block that has an SAE, on drawn pictures of the kind that it was trained on. The
published claim (arXiv:2504.08729) is that 10 to 15 % of latents and of neurons are steerable, so that a dictionary has
thousands more of them; of random directions nothing is said.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from defense.benchmarks.environment import environment_of, machine_words, write_json
from defense.embedded.catalogues import SEED, WORDS, web_examples
from defense.explain.describe import measure_baselines
from defense.hosts.clip import EMBEDDED, load_clip
from defense.hosts.shipped import MODELS
from defense.store import checkpoint

RESULTS = Path(__file__).with_name("results") / "units.json"
_KINDS = {"latents": "SAE latents", "neurons": "MLP neurons", "channels": "residual channels", "random": "random"}


def measure(n: int, n_sampled: int, n_steered: int) -> list[dict[str, Any]]:
    """Return what each block's SAE and the units beside it come to, as a catalogue's provenance has it.

    Args:
        n: Pictures.
        n_sampled: Units of each kind to steer.
        n_steered: Pictures to steer each on.
    """
    clip = load_clip(EMBEDDED)
    pictures = list(web_examples(n, SEED, clip))
    return [
        {
            "hook_point": each.hook_point,
            "d_sae": each.sae.config.d_sae,
            **measure_baselines(
                clip, each.hook_point, each.sae, pictures, WORDS, n_sampled=n_sampled, n_steered=n_steered
            ),
        }
        for each in checkpoint.shipped_saes(MODELS[EMBEDDED])
    ]


def table(result: dict[str, Any]) -> str:
    """Return a result as Markdown tables, one for each block."""
    parts = []
    for block in result["blocks"]:
        swept, likeness = block["steerability"], block["monosemanticity"]
        headings = " | ".join(f"at {strength:g}" for strength in swept["strengths"])
        lines = [
            f"{block['hook_point'].removesuffix('.hook_resid_post')}, {block['d_sae']:,} latents:",
            "",
            f"| units | n | {headings} | monosemanticity |",
            "|---" * (len(swept["strengths"]) + 3) + "|",
        ]
        for kind, found in swept["kinds"].items():
            columns = zip(*(found[name] for name in ("share", "low", "high", "n_words_reached")), strict=True)
            cells = [f"{100 * x:.0f} ({100 * low:.0f}-{100 * high:.0f}), {words}" for x, low, high, words in columns]
            median = likeness["kinds"][kind]
            lines.append(f"| {_KINDS[kind]} | {found['n']} | {' | '.join(cells)} | {_median(median)} |")
        overlap = "do not overlap" if swept["separates"] else "overlap"
        lines += [
            "",
            f"At {swept['strength']:g} latents are furthest ahead of random directions, and the two intervals "
            f"{overlap}. Monosemanticity of all pairs of pictures: {likeness['all_pairs']:.3f}.",
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _median(found: dict[str, float]) -> str:
    return f"{found['median']:.3f} ({found['low']:.3f}-{found['high']:.3f})" if found["n"] else "-"


def caption(result: dict[str, Any]) -> str:
    """Return what a reader of the tables has to know."""
    words = result["blocks"][0]["steerability"]["n_words"]
    return (
        "Percent of a sample of units with S > 0.1 when set to so many times the mean norm of the stream on every "
        f"token (95 % interval), and how many of {words} words some unit of the sample reaches; monosemanticity: "
        "median over all units of a kind (95 % interval), by the CLIP's own embeddings. "
        f"{result['n']} drawn pictures, each unit steered on {result['n_steered']}."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(
        prog="python -m defense.benchmarks.units", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the result goes (default: %(default)s)")
    parser.add_argument("--n", type=int, default=300, help="pictures")
    parser.add_argument("--n-sampled", type=int, default=64, help="units of each kind to steer")
    parser.add_argument("--n-steered", type=int, default=4, help="pictures to steer each on")
    argv = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(argv)
    environment = environment_of(shlex.join(["python", "-m", "defense.benchmarks.units", *argv]))
    result = {
        "environment": asdict(environment),
        "n": options.n,
        "n_steered": options.n_steered,
        "blocks": measure(options.n, options.n_sampled, options.n_steered),
    }
    write_json(options.out, result)
    print(table(result), caption(result), machine_words(result["environment"]), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
