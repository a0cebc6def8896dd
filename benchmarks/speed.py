"""What the defense costs on a CPU: `encode_image`, end to end, beside plain CLIP and beside what others do.

    python -m defense.benchmarks.speed --out speed.json

| variant | after block L, at every token |
|---|---|
| plain CLIP | nothing |
| naive splice | full encode, top-k, scatter to dense, decode, decode again without S, error term added back |
| sparse decode | full encode, top-k, subtract the decoder rows of the members of S that were kept |
| ours | the library: `wrap` and its Suppressor |

Measured: wall-clock time of `model.encode_image(pixel_values)` in float32 under `inference_mode`. All variants run in
one process, in every round once, in an order drawn anew for each round, so that drift hits all alike; "x plain" is the
median over rounds of the ratio within a round. All variants share one set of model weights (random ones, of a fixed
seed). The parity gate compares what they compute before anything is timed; where it fails, nothing is timed. Stored
results and their tables call a variant an "arm".

The SAE is random. The encoder biases of S are shifted until exactly the wanted share of tokens fires, that is, has a
positive pre-activation in S. Such a token costs a TopK rule the whole encoder, whether or not its latent is then among
the k largest: cost follows `n_firing`, not `n_surviving`. (The encoder columns of S are longer than the others, so that
most do survive: where none does, the gate has nothing to compare.) Naive splice and sparse decode cost the same
whatever fires; they are timed on the SAE with 5 % of tokens firing.

The floor is the encoder matmul [n_firing, d_model] x [d_model, d_sae] at the rate that the same matmul on all tokens
reached in the same rounds. It stands against what a variant adds to plain CLIP, not against its whole time. A rule that
does not couple latents (relu) needs none.

Extra MiB is what a variant needs above plain CLIP: the weights that it holds, plus the rise of the process's resident
memory at the peak of one call, less the same rise in plain CLIP. Linux tells that rise exactly (clear_refs, VmHWM);
`getrusage` could not, as its peak is that of building the SAEs. Buffers that the matmul library keeps between calls are
missing from it: they were there before.

Not measured: accuracy; GPUs; torch.compile; half precision; loading and preprocessing of pictures; the text tower;
attaching a defense. Random weights cost what trained ones do, but which share of tokens fires depends on weights and
pictures: hence several.

| file | what |
|---|---|
| `speed_rows.py` | case and row, as JSON and as a table |
| `speed_workloads.py` | the model, the pictures, the SAEs |
| `speed_variants.py` | the variants |
| `speed_timing.py` | the parity gate and the timing |
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from defense.benchmarks.cost import torch_threads
from defense.benchmarks.environment import busy_words, environment_of
from defense.benchmarks.speed_rows import Case, caption, save_rows, table
from defense.benchmarks.speed_timing import gate, time_variants
from defense.benchmarks.speed_variants import make_rivals
from defense.benchmarks.speed_workloads import create_model, make_workloads, set_stage
from defense.errors import ConfigError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m defense.benchmarks.speed", description=__doc__.splitlines()[0])
    default = Case(threads=torch.get_num_threads())
    parser.add_argument("--model", default=default.model, help="open_clip's name of a ViT (default: %(default)s)")
    for name, text in (
        ("batch", "pictures per call"),
        ("d-sae", "latents of the SAE"),
        ("k", "latents kept per token by the TopK rule"),
        ("n-set", "latents in S"),
        ("block", "block whose output is edited, from 0"),
        ("rounds", "how often each variant is timed"),
        ("threads", "threads of torch"),
        ("seed", "of everything that is random"),
    ):
        value = getattr(default, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{text} (default: %(default)s)")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure memory as well")
    parser.add_argument("--out", type=Path, help="write the rows there, as JSON")
    return parser


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table and return the exit code: 1 where the gate failed, 2 for arguments that cannot work."""
    argv = sys.argv[1:] if argv is None else argv
    fields = vars(_parser().parse_args(argv))
    out, memory = fields.pop("out"), fields.pop("memory")
    try:
        case = Case(**fields)
        if out is not None and not out.resolve().parent.is_dir():
            raise ConfigError(f"{out.parent} is no folder; create it first")
        environment = environment_of(shlex.join(["python", "-m", "defense.benchmarks.speed", *argv]))
        if busy := busy_words(environment):
            _say(busy)
        with torch_threads(case.threads), torch.inference_mode():
            stage = set_stage(create_model(case), case)
            rivals = [make_rivals(stage, workload) for workload in make_workloads(stage)]
            if failures := gate(stage, rivals):
                print("The parity gate failed; nothing was timed.", *failures, sep="\n", file=sys.stderr)
                return 1
            rows = time_variants(stage, rivals, environment, memory=memory, report=_say)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if out is not None:
        save_rows(rows, out)
    print(table(rows), caption(rows), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
