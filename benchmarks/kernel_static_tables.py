"""What `--static` found, as Markdown; to show it takes no triton."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from defense.benchmarks.environment import checkout_words
from defense.benchmarks.kernel_cases import CASES, DEFAULT_SET


def static_table(result: Mapping[str, Any]) -> str:
    """Return the tables of a result of `measure_static` as Markdown: the count kernel everywhere, all on Hopper."""
    first = CASES[0].model
    shown = [
        row for row in result["kernels"]
        if row["kernel"] == "count" or (row["capability"] == 90 and row["model"] == first)
    ]  # fmt: skip
    kernels = [
        "| kernel | GPU | shape | registers | stack B | shared B | programs per SM | tensor-core instructions "
        "| instructions | a step | a slot |",
        "|---" * 11 + "|",
    ]
    for row in shown:
        step, slot = ("-" if row[name] is None else str(row[name]) for name in ("per_step", "per_slot"))
        kernels.append(
            f"| {row['kernel']} | sm_{row['capability']} | {row['model']}, {row['dtype']} | {row['registers']} "
            f"| {row['stack_bytes']} | {row['shared_bytes']:,} | {row['programs_per_sm']} | {row['n_tensor_core']} "
            f"| {row['n_instructions']} | {step} | {slot} |"
        )
    slots = ["| data | tokens firing | slots a tile | were none skipped |", "|---" * 4 + "|"]
    for row in result["slots"]:
        share = f"{row['n_firing']} of {row['n_tokens']}"
        slots.append(f"| {row['data']} | {share} | {row['slots']:.1f} | {row['all_slots']:.1f} |")
    model = ["| shape | firing | floor ms | count kernel ms, on paper | x floor |", "|---" * 5 + "|"]
    for row in result["model"]:
        ratio = row["count_ms"] / row["floor_ms"]
        model.append(
            f"| {row['model']} | {row['share']:.0%} | {row['floor_ms']:.3f} | {row['count_ms']:.3f} | {ratio:.2f} |"
            .replace("% |", " % |")
        )  # fmt: skip
    return "\n\n".join("\n".join(each) for each in (kernels, slots, model))


def static_caption(result: Mapping[str, Any]) -> str:
    """Return what a reader of the tables has to know."""
    n_tokens = max(row["n_tokens"] for row in result["slots"])
    return (
        f"Compiled, not run: Triton {result['triton']}, |S| {DEFAULT_SET}. A step goes along d_model, a slot is a "
        'candidate of a tile\'s tokens; "-": no such loop. '
        f"Slots: at most {n_tokens:,} tokens, followed on a CPU. On paper: bf16 on an H200 (790 TFLOP/s, 7.5 TB/s from "
        f"its L2 cache, the latter inferred). {checkout_words(result['environment'])}, "
        f"{result['environment']['timestamp']}."
    )
