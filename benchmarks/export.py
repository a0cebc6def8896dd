"""What an exported graph costs on a CPU, and how fast the runtime without torch is.

    python -m defense.benchmarks.export --out export.json

Two tables.

*Graphs* (`export_graphs.py`): one open_clip model with random weights and one random SAE (see `speed_workloads.py`), as
ONNX and in PyTorch. ONNX Runtime has a process of its own (`onnx_process.py`), PyTorch another, and only one of the two
is at work at a time: each variant once in every round, in an order drawn anew for each round. "x plain" is the ratio to
the plain CLIP in ONNX within a round; "x fp32" is the ratio to the fp32 graph of the same defense, for the variants
that are another form of it. Both are medians over rounds, with their own spread. Before anything is timed, every
variant's embeddings are held against PyTorch's; int8 by its cosine only.

*Runtime* (`export_runtime.py`): the embedded model and its defense as a bundle. Images per second of each stage alone
(decoding and preparation by one thread, the graph at the batch size), of all stages together, the time from a fresh
process to its first answer. In eight bits: how much faster the int8 bundle is than the fp32 one, and how often it gives
the same label on pictures of the embedded benchmark; with the TopK rule of its SAEs ("exact") and as it ships,
calibrated to thresholds ("delta"). The graphs take turns, round by round.

Not measured: GPUs; half precision, which is for CUDA.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from defense.benchmarks.environment import busy_words, checkout_words, environment_of, write_json
from defense.benchmarks.speed_rows import Case
from defense.errors import ConfigError


def graph_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of graphs in Markdown, from `GraphRow`s as JSON values."""
    lines = ["| arm | ms (p20-p80) | x plain (p20-p80) | x fp32 (p20-p80) | max difference |", "|---|---|---|---|---|"]
    for row in rows:
        spread = f"{row['latency_ms']:.1f} ({row['p20_ms']:.1f}-{row['p80_ms']:.1f})"
        ratios = f"{_ratio(row['x_plain'])} | {_ratio(row['x_fp32'])}"
        lines.append(f"| {row['arm']} | {spread} | {ratios} | {row['max_abs_diff']:.0e} |")
    return "\n".join(lines)


def _ratio(ratio: Mapping[str, float] | None) -> str:
    return "" if ratio is None else f"{ratio['median']:.3f} ({ratio['p20']:.3f}-{ratio['p80']:.3f})"


def runtime_table(row: Mapping[str, Any]) -> str:
    """Return the table of the runtime in Markdown, from a `Runtime` as JSON values."""
    lines = [
        "| stage | |",
        "|---|---|",
        f"| decode a JPEG of {row['picture_px']} px, one thread | {row['decode_per_s']:.0f} images/s |",
        f"| preprocess, one thread | {row['preprocess_per_s']:.0f} images/s |",
    ]
    for each in row["eight_bits"]:
        lines += [
            f"| graph, {each['mode']}, fp32 | {each['fp32_per_s']:.0f} images/s |",
            f"| graph, {each['mode']}, int8 | {each['int8_per_s']:.0f} images/s |",
            f"| int8 over fp32, {each['mode']}, time (p20-p80) | {_ratio(each['x_fp32'])} |",
            f"| int8 gives the label of fp32, {each['mode']} | {100 * each['agreement']:.2f} % |",
        ]
    lines += [
        f"| files to labels, exact, fp32 | {row['all_per_s']:.0f} images/s |",
        f"| import to first answer | {row['first_answer_s']:.2f} s |",
    ]
    return "\n".join(lines)


def caption(result: Mapping[str, Any]) -> str:
    """Return what a reader of the tables has to know, from the stored result."""
    case, here, runtime = result["case"], result["environment"], result["runtime"]
    return _doubt(result) + (
        f"Graphs: {case['model']}, random weights, batch {case['batch']}, block {case['block']}, d_sae "
        f"{case['d_sae']}, k {case['k']}, |S| {case['n_set']}, seed {case['seed']}, {case['rounds']} rounds. Runtime: "
        f"the embedded model, {runtime['n']} pictures, batches of {runtime['batch']}.\n"
        f"{here['cpu']}, {here['cores']} cores, {case['threads']} threads, load before the run {here['load']:.1f}, "
        f"onnxruntime {result['onnxruntime']}, torch {here['torch']}, {checkout_words(here)}, {here['timestamp']}."
    )


def _doubt(result: Mapping[str, Any]) -> str:
    """Return what to hold against a result that was taken before each engine had a process of its own; else nothing."""
    if result.get("is_apart"):
        return ""
    here, case = result["environment"], result["case"]
    return (
        f"Do not compare the rows of PyTorch with those of ONNX: in this run PyTorch, with {case['threads']} threads, "
        "took as long as it does on one core, while other programs were at work (load "
        f"{here['load']:.1f} on {here['cores']} cores). Its threads wait for each other after every layer, so that one "
        "that shares its core holds up all. In the table of the cost on a CPU, from a run of its own, the same model "
        "takes half of that. Not yet taken again with each engine in its own process.\n"
    )


def _parser() -> argparse.ArgumentParser:
    import torch

    parser = argparse.ArgumentParser(prog="python -m defense.benchmarks.export", description=__doc__.splitlines()[0])
    default = Case(threads=torch.get_num_threads())
    parser.add_argument("--model", default=default.model, help="open_clip's name of a ViT (default: %(default)s)")
    for name in ("batch", "d-sae", "k", "n-set", "block", "rounds", "threads", "seed"):
        value = getattr(default, name.replace("-", "_"))
        parser.add_argument(
            f"--{name}",
            type=int,
            default=value,
            help="see `python -m defense.benchmarks.speed --help` (default: %(default)s)",
        )
    parser.add_argument("--pictures", type=int, default=2000, help="for the second table (default: %(default)s)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="time torch.compile")
    parser.add_argument("--out", type=Path, help="write the result there, as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables and return the exit code: 2 for what cannot work."""
    from defense.benchmarks.export_graphs import measure_graphs
    from defense.benchmarks.export_runtime import measure_runtime

    argv = sys.argv[1:] if argv is None else argv
    fields = vars(_parser().parse_args(argv))
    out, compiled, pictures = fields.pop("out"), fields.pop("compile"), fields.pop("pictures")
    try:
        case = Case(**fields)
        environment = environment_of(shlex.join(["python", "-m", "defense.benchmarks.export", *argv]))
        if busy := busy_words(environment):
            print(busy, file=sys.stderr)
        result: dict[str, Any] = {
            "graphs": [asdict(row) for row in measure_graphs(case, compiled=compiled)],
            "runtime": asdict(measure_runtime(pictures, 32, case.seed)),
            "case": asdict(case),
            "environment": asdict(environment),
            "onnxruntime": version("onnxruntime"),
            "is_apart": True,
        }
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if out is not None:
        write_json(out, result)
    print(graph_table(result["graphs"]), runtime_table(result["runtime"]), caption(result), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
