"""What an exported graph costs on a CPU, and how fast the runtime without torch is.

    python -m defense.benchmarks.export --out export.json

Two tables. *Graphs*: one open_clip model with random weights and one random SAE (see `speed_workloads.py`), as ONNX and
in PyTorch. All arms run in one process, in every round once, in an order drawn anew for each round; "x plain" is the
median over rounds of the ratio to the plain CLIP in ONNX within a round. Before anything is timed, every arm's
embeddings are held against PyTorch's; int8 by its cosine only. "x fp32" is the same ratio to the fp32 graph of the same
defense, for the arms that compute that one otherwise. Each ratio has its own spread, over rounds.

*Runtime*: the embedded model and its defense as a bundle. Images per second of each stage alone (decoding and
preparation by one thread, the graph at the batch size), of all stages together, the time from a fresh process to its
first answer. In eight bits: how much faster the int8 bundle is than the fp32 one, and how often it gives the same label
on pictures of the embedded benchmark; with the defense as it is ("exact") and calibrated to thresholds on other
pictures ("delta"). The graphs take turns, round by round.

Not measured: GPUs; half precision, which is for CUDA.
"""

from __future__ import annotations

import argparse
import io
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from defense.benchmarks import speed_workloads
from defense.benchmarks.cost import percentiles, time_interleaved, torch_threads
from defense.benchmarks.environment import checkout_words, environment_of
from defense.benchmarks.speed_rows import Case
from defense.benchmarks.speed_variants import twin
from defense.benchmarks.speed_workloads import Stage, Workload, make_workloads
from defense.classify.classifier import RobustClassifier
from defense.data import images
from defense.errors import ConfigError
from defense.export.exporter import export_onnx
from defense.export.int8 import quantize
from defense.export.runtime import OnnxClassifier
from defense.export.sessions import open_session
from defense.export.vision import VisionGraph, trace_vision, write
from defense.fit.calibrate import calibrated
from defense.hosts.attach import attach, detach
from defense.hosts.clip import EMBEDDED
from defense.hosts.defense import Site
from defense.world.draws import typographic
from defense.world.scenes import OBJECTS, render

_ATOL = 1e-5
_INT8_COSINE = 0.97
_N_LABELS = 1000
_PLAIN = "ONNX, plain CLIP"
_RUNTIME_ROUNDS = 5
_N_CALIBRATED = 500


@dataclass(frozen=True)
class Ratio:
    """Of two times measured in the same round: median over rounds, and 20th and 80th percentile."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, ms: np.ndarray, base_ms: np.ndarray) -> Ratio:
        """Return the ratio of two arms' times, [rounds] each."""
        p20, median, p80 = percentiles(ms / base_ms)
        return cls(median, p20, p80)


@dataclass(frozen=True)
class GraphRow:
    """One arm of the first table.

    Attributes:
        arm: Its name.
        latency_ms: Median over rounds.
        p20_ms: 20th percentile.
        p80_ms: 80th percentile.
        x_plain: Ratio to plain CLIP in ONNX.
        x_fp32: Ratio to the fp32 graph of the same defense, for an arm that is another form of it; else None.
        max_abs_diff: Of its embeddings to PyTorch's.
        rounds_ms: Every single time.
    """

    arm: str
    latency_ms: float
    p20_ms: float
    p80_ms: float
    x_plain: Ratio
    x_fp32: Ratio | None
    max_abs_diff: float
    rounds_ms: tuple[float, ...]


@dataclass(frozen=True)
class EightBits:
    """What int8 changes for one way of writing the defense.

    Attributes:
        mode: That way; see `vision`.
        fp32_per_s: Pictures through the fp32 graph, per second.
        int8_per_s: Pictures through the int8 graph, per second.
        x_fp32: Ratio of the int8 graph's time to the fp32 graph's.
        agreement: Share of pictures with the label of the fp32 bundle.
    """

    mode: str
    fp32_per_s: float
    int8_per_s: float
    x_fp32: Ratio
    agreement: float


@dataclass(frozen=True)
class Runtime:
    """The second table.

    Attributes:
        n: Pictures.
        batch: Pictures per call of the graph.
        picture_px: Width and height of the pictures as stored.
        decode_per_s: Files decoded by one thread, per second.
        preprocess_per_s: Pictures resized and normalized by one thread, per second.
        all_per_s: Files to labels with the fp32 bundle of the defense as it is, per second.
        eight_bits: One for the defense as it is, one for the calibrated.
        first_answer_s: From the start of the import to the first answer in a fresh process, median of five.
    """

    n: int
    batch: int
    picture_px: int
    decode_per_s: float
    preprocess_per_s: float
    all_per_s: float
    eight_bits: tuple[EightBits, ...]
    first_answer_s: float


def graph_arms(
    stage: Stage, folder: Path, threads: int, *, compiled: bool
) -> tuple[dict[str, Callable[[], object]], dict[str, float], dict[str, str]]:
    """Return what to time, by name; how far each arm's embeddings are from PyTorch's; the fp32 graph an arm stands for.

    Raises:
        ConfigError: An arm does not compute what PyTorch does, so that its time would mean nothing.
    """
    pixel_values = stage.pixel_values
    d_embed = embeds_of(stage.model, pixel_values[:1]).shape[1]
    text_embeds = nn.functional.normalize(torch.randn(_N_LABELS, d_embed), dim=-1)
    feed = {"pixel_values": pixel_values.numpy()}
    jobs: dict[str, Callable[[], object]] = {}
    differences: dict[str, float] = {}
    fp32_of: dict[str, str] = {}

    def add(name: str, embed: Callable[[], object], got: np.ndarray, want: Tensor, *, rough: bool = False) -> None:
        differences[name] = check_arm(name, got, want, rough=rough)
        jobs[name] = embed

    def add_onnx(name: str, path: Path, want: Tensor, *, rough: bool = False) -> None:
        session = open_session(path, ["CPUExecutionProvider"], {"intra_op_num_threads": threads})
        run = partial(session.run, ["image_embeds"], feed)
        add(name, run, run()[0], want, rough=rough)

    def exported(name: str, model: nn.Module) -> tuple[Path, Tensor]:
        want = embeds_of(model, pixel_values)
        path = folder / f"{len(jobs)}.onnx"
        write(trace_vision(VisionGraph(model), stage.preprocess.size, text_embeds), path, {})
        add_onnx(name, path, want)
        return path, want

    exported(_PLAIN, stage.model)
    for workload in make_workloads(stage):
        rule = f"{ {'topk': 'exact TopK'}.get(workload.config.act, 'delta') }, {workload.latent_set.edit}"
        if workload.share in (0.2, 1.0) and workload.config.act == "topk":
            continue
        model = defended(stage, workload)
        name = f"ONNX, {rule}, {workload.share:.0%} of tokens firing".replace("%", " %")
        path, want = exported(name, model)
        if workload.config.act == "relu":
            others = set(jobs)
            quantize(path, folder / "int8.onnx")
            add_onnx("ONNX int8, delta, scale", folder / "int8.onnx", want, rough=True)
            add("PyTorch eager, delta, scale", partial(model.encode_image, pixel_values), want.numpy(), want)
            if compiled:
                fast = torch.compile(model.encode_image)
                got = nn.functional.normalize(fast(pixel_values), dim=-1)
                add("torch.compile, delta, scale", partial(fast, pixel_values), got.numpy(), want)
            fp32_of |= dict.fromkeys(set(jobs) - others, name)
    return jobs, differences, fp32_of


def check_arm(name: str, got: np.ndarray, want: Tensor, *, rough: bool) -> float:
    """Return the largest difference of an arm's embeddings to PyTorch's.

    Raises:
        ConfigError: It is too large for a comparison of times; where `rough`, the cosine is too small.
    """
    difference = float(np.abs(got - want.numpy()).max())
    cosine = float((got * want.numpy()).sum(1).min())
    if cosine < _INT8_COSINE if rough else difference > _ATOL:
        raise ConfigError(f"{name} differs by {difference:.1e} (cosine {cosine:.4f}); nothing was timed")
    return difference


def defended(stage: Stage, workload: Workload) -> Any:
    """Return the stage's model with a workload's SAE in it."""
    model = twin(stage.model)
    attach(model, (Site(stage.case.hook_point, workload.config, workload.parameters, (workload.latent_set,)),))
    return model


def embeds_of(model: Any, pixel_values: Tensor) -> Tensor:
    """Return normalized image embeddings, [batch, d_embed]."""
    return nn.functional.normalize(model.encode_image(pixel_values), dim=-1)


def measure_graphs(case: Case, *, compiled: bool) -> list[GraphRow]:
    """Return the rows of the first table."""
    # Not inference_mode: tensors made there cannot be traced.
    with torch_threads(case.threads), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        stage = speed_workloads.set_stage(speed_workloads.create_model(case).requires_grad_(False), case)
        jobs, differences, fp32_of = graph_arms(stage, Path(folder), case.threads, compiled=compiled)
        times = time_interleaved(jobs, case.rounds, case.seed)
    rows = []
    for name, ms in times.items():
        p20, median, p80 = percentiles(ms)
        x_plain = Ratio.of(ms, times[_PLAIN])
        x_fp32 = Ratio.of(ms, times[fp32_of[name]]) if name in fp32_of else None
        rows.append(GraphRow(name, median, p20, p80, x_plain, x_fp32, differences[name], tuple(ms.tolist())))
    return rows


def _per_s(n: int, job: Callable[[], object]) -> float:
    """Return `n` over the time of the fastest of three calls."""
    fastest = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        job()
        fastest = min(fastest, time.perf_counter() - start)
    return n / fastest


def measure_runtime(n: int, batch: int, seed: int) -> Runtime:
    """Return the second table."""
    pictures = [render(each.scene) for each in typographic(n, seed)]
    files = []
    for picture in pictures:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=95)
        files.append(file.getvalue())
    with tempfile.TemporaryDirectory() as folder:
        bundles = export_embedded(Path(folder), batch, seed)
        clf = bundles["exact", "fp32"]
        decoded = [images.decode(file).image for file in files]
        pixel_values = np.stack([clf.bundle.preprocess(image) for image in decoded])
        chunks = np.array_split(pixel_values, max(1, n // batch))
        with_graph = {" ".join(key): partial(_encode_all, each, chunks) for key, each in bundles.items()}
        times = time_interleaved(with_graph, _RUNTIME_ROUNDS, seed)
        labels = {" ".join(key): each.predict(files) for key, each in bundles.items()}
        first = Path(folder) / "first.jpg"
        first.write_bytes(files[0])
        return Runtime(
            n=n,
            batch=batch,
            picture_px=decoded[0].width,
            decode_per_s=_per_s(n, lambda: [images.decode(file) for file in files]),
            preprocess_per_s=_per_s(n, lambda: [clf.bundle.preprocess(image) for image in decoded]),
            all_per_s=_per_s(n, lambda: clf.predict(files)),
            eight_bits=tuple(
                EightBits(
                    mode=mode,
                    fp32_per_s=1e3 * n / float(np.median(times[f"{mode} fp32"])),
                    int8_per_s=1e3 * n / float(np.median(times[f"{mode} int8"])),
                    x_fp32=Ratio.of(times[f"{mode} int8"], times[f"{mode} fp32"]),
                    agreement=float((labels[f"{mode} int8"] == labels[f"{mode} fp32"]).mean()),
                )
                for mode in ("exact", "delta")
            ),
            first_answer_s=float(np.median([_first_answer_s(Path(folder) / "exact-fp32", first) for _ in range(5)])),
        )


def export_embedded(folder: Path, batch: int, seed: int) -> dict[tuple[str, str], OnnxClassifier]:
    """Return the embedded model's bundles by mode and dtype; "delta" is the defense calibrated on other pictures."""
    robust = RobustClassifier.from_pretrained(EMBEDDED, device="cpu").set_labels(list(OBJECTS))
    clip, defense, text_embeds = robust.clip, robust.defense, robust.text_embeds()
    assert defense is not None
    bundles = {}
    for mode in ("exact", "delta"):
        if mode == "delta":
            pictures = [clip.preprocess(render(each.scene)) for each in typographic(_N_CALIBRATED, seed + 1)]
            detach(clip.model)
            # int8 is compared with fp32 of this same graph, so agreement with the exact rule is no gate here.
            values = torch.from_numpy(np.stack(pictures))
            defense, _ = calibrated(clip, defense, values, least_agreement=0.0, text_embeds=text_embeds)
            robust = RobustClassifier(clip, defense).set_labels(list(OBJECTS))
        for dtype in ("fp32", "int8"):
            export_onnx(robust, folder / f"{mode}-{dtype}", mode=mode, dtype=dtype)
            bundles[mode, dtype] = OnnxClassifier(folder / f"{mode}-{dtype}", batch_size=batch)
    return bundles


def _encode_all(clf: OnnxClassifier, chunks: Sequence[np.ndarray]) -> None:
    for chunk in chunks:
        clf.encode_pixels(chunk)


def _first_answer_s(bundle: Path, picture: Path) -> float:
    code = (
        "import sys, time; start = time.perf_counter()\n"
        "from defense.export.runtime import OnnxClassifier\n"
        "OnnxClassifier(sys.argv[1])(sys.argv[2]); print(time.perf_counter() - start)\n"
        "assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-P", "-c", code, str(bundle), str(picture)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def graph_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the first table in Markdown."""
    lines = ["| arm | ms (p20-p80) | x plain (p20-p80) | x fp32 (p20-p80) | max difference |", "|---|---|---|---|---|"]
    for row in rows:
        spread = f"{row['latency_ms']:.1f} ({row['p20_ms']:.1f}-{row['p80_ms']:.1f})"
        ratios = f"{_ratio(row['x_plain'])} | {_ratio(row['x_fp32'])}"
        lines.append(f"| {row['arm']} | {spread} | {ratios} | {row['max_abs_diff']:.0e} |")
    return "\n".join(lines)


def _ratio(ratio: Mapping[str, float] | None) -> str:
    return "" if ratio is None else f"{ratio['median']:.3f} ({ratio['p20']:.3f}-{ratio['p80']:.3f})"


def runtime_table(row: Mapping[str, Any]) -> str:
    """Return the second table in Markdown."""
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
    """Return what a reader of the tables has to know."""
    case, here, runtime = result["case"], result["environment"], result["runtime"]
    return (
        f"Graphs: {case['model']}, random weights, batch {case['batch']}, block {case['block']}, d_sae "
        f"{case['d_sae']}, k {case['k']}, |S| {case['n_set']}, seed {case['seed']}, {case['rounds']} rounds. Runtime: "
        f"the embedded model, {runtime['n']} pictures, batches of {runtime['batch']}.\n"
        f"{here['cpu']}, {here['cores']} cores, {case['threads']} threads, load before the run {here['load']:.1f}, "
        f"onnxruntime {result['onnxruntime']}, torch {here['torch']}, {checkout_words(here)}, {here['timestamp']}."
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m defense.benchmarks.export", description=__doc__.splitlines()[0])
    default = Case(threads=torch.get_num_threads())
    parser.add_argument("--model", default=default.model, help="open_clip's name of a ViT (default: %(default)s)")
    for name in ("batch", "d-sae", "k", "n-set", "block", "rounds", "threads", "seed"):
        value = getattr(default, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=int, default=value, help="see `speed` (default: %(default)s)")
    parser.add_argument("--pictures", type=int, default=2000, help="for the second table (default: %(default)s)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="time torch.compile")
    parser.add_argument("--out", type=Path, help="write the result there, as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables and return the exit code: 2 for what cannot work."""
    argv = sys.argv[1:] if argv is None else argv
    fields = vars(_parser().parse_args(argv))
    out, compiled, pictures = fields.pop("out"), fields.pop("compile"), fields.pop("pictures")
    try:
        case = Case(**fields)
        environment = environment_of(shlex.join(["python", "-m", "defense.benchmarks.export", *argv]))
        result: dict[str, Any] = {
            "graphs": [asdict(row) for row in measure_graphs(case, compiled=compiled)],
            "runtime": asdict(measure_runtime(pictures, 32, case.seed)),
            "case": asdict(case),
            "environment": asdict(environment),
            "onnxruntime": version("onnxruntime"),
        }
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(graph_table(result["graphs"]), runtime_table(result["runtime"]), caption(result), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
