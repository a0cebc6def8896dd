"""The command line: `defense classify`, `export`, `bench`, `import`, `train`, `info`, `doctor`.

stdout is data, stderr is talk. Exit codes: 0 ok, 2 usage, 3 a package is missing, 4 some inputs failed, 5 a defense
was rejected, 130 interrupted.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from . import artefact
from .errors import CheckpointError, DefenseError, InvalidImageError, MissingDependencyError, NonFiniteError

if TYPE_CHECKING:
    from .classifier import Explanation, RobustClassifier
    from .export.exporter import ExportReport

app = typer.Typer(
    help="Zero-shot image classification with CLIP that does not read the note on the apple.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_out = Console()
_err = Console(stderr=True)

EXIT_USAGE, EXIT_MISSING, EXIT_INPUTS, EXIT_ARTEFACT, EXIT_INTERRUPTED = 2, 3, 4, 5, 130
_PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
_PROGRESS_FROM = 20


class Variant(StrEnum):
    """Which latents of an SAE count (train.py)."""

    topk = "topk"
    batchtopk = "batchtopk"
    matryoshka = "matryoshka"
    relu = "relu"


class Tokens(StrEnum):
    """Which tokens of a picture an SAE is trained on."""

    cls = "cls"
    patch = "patch"
    all = "all"


class Mode(StrEnum):
    """How a TopK SAE is written in an exported graph."""

    exact = "exact"
    static = "static"
    delta = "delta"


class Dtype(StrEnum):
    """Numbers of an exported graph."""

    fp32 = "fp32"
    fp16 = "fp16"
    int8 = "int8"


class Layout(StrEnum):
    """Whose files stand around an exported graph."""

    bundle = "bundle"
    triton = "triton"
    kserve = "kserve"


class OnError(StrEnum):
    """What becomes of a picture that cannot be read."""

    skip = "skip"
    raise_ = "raise"
    return_ = "return"


def _say(text: str, style: str | None = None) -> None:
    """Print a line of talk on stderr, as it is."""
    _err.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _put(text: str, style: str | None = None) -> None:
    """Print a line of data on stdout, as it is."""
    _out.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _exit_codes() -> Iterator[None]:
    """Turn exceptions into one line on stderr and the exit code of their kind."""
    try:
        yield
    except KeyboardInterrupt:
        _say("interrupted")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except (DefenseError, OSError) as error:
        code = EXIT_USAGE
        for kind, value in (
            (MissingDependencyError, EXIT_MISSING),
            (CheckpointError, EXIT_ARTEFACT),
            (NonFiniteError, EXIT_ARTEFACT),
            (InvalidImageError, EXIT_INPUTS),
        ):
            code = value if isinstance(error, kind) else code
        _say(f"error: {error}", "red")
        raise typer.Exit(code) from None


@app.command()
def classify(
    pictures: Annotated[
        list[Path] | None, typer.Argument(help="Files or folders. By default the pictures that ship with the package.")
    ] = None,
    labels: Annotated[str | None, typer.Option(help='What to choose from, e.g. "dog,cat".')] = None,
    labels_file: Annotated[Path | None, typer.Option(help="The same, one label a line.")] = None,
    template: Annotated[str, typer.Option(help='"simple", "hf", "openai", or a template with {}.')] = "simple",
    defense: Annotated[str, typer.Option(help='"embedded", a folder, a hub id, or an exported bundle.')] = "embedded",
    model: Annotated[str | None, typer.Option(help="open_clip model; by default the one the defense names.")] = None,
    pretrained: Annotated[str | None, typer.Option(help="open_clip's tag of its weights.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Stock CLIP only.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines.")] = False,
    on_error: Annotated[OnError, typer.Option(help="What becomes of a picture that cannot be read.")] = OnError.skip,
    top_k: Annotated[int, typer.Option(min=1, help="How many labels to print.")] = 3,
    device: Annotated[str, typer.Option(help='"auto", "cpu", "cuda".')] = "auto",
) -> None:
    """Classify pictures with plain and with defended CLIP, side by side."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with _exit_codes():
        from .classifier import EMBEDDED, RobustClassifier
        from .export import bundle

        paths = _example_pictures() if not pictures else list(_expand(pictures))
        if not paths:
            raise typer.BadParameter(f"no pictures in {', '.join(map(str, pictures or []))}")
        if bundle.is_bundle(defense):
            if plain or model is not None:
                raise typer.BadParameter("a bundle holds one defended model; --plain and --model do not go with it")
            given = None if labels is None and labels_file is None else _chosen_labels(labels, labels_file, False)
            _classify_with_bundle(defense, paths, given, template, as_json=as_json, on_error=on_error, top_k=top_k)
            return
        uses_embedded = defense == EMBEDDED and model in (None, EMBEDDED)
        chosen = _chosen_labels(labels, labels_file, uses_embedded)
        clf = RobustClassifier.from_pretrained(defense, model=model, pretrained=pretrained, device=device)
        clf.set_labels(chosen, template)
        n_failed = _classify_all(clf, paths, plain=plain, as_json=as_json, on_error=on_error, top_k=top_k)
        if not pictures and not as_json:
            _print_next_step()
        if n_failed:
            _say(f"{n_failed} of {len(paths)} pictures could not be read")
            raise typer.Exit(EXIT_INPUTS)


def _chosen_labels(labels: str | None, labels_file: Path | None, uses_embedded: bool) -> Sequence[str]:
    if labels is not None and labels_file is not None:
        raise typer.BadParameter("give --labels or --labels-file, not both")
    if labels_file is not None:
        from .labels import read_labels

        return read_labels(labels_file)
    if labels is not None:
        return [label.strip() for label in labels.split(",")]
    if not uses_embedded:
        raise typer.BadParameter('--labels or --labels-file is missing, e.g. --labels "dog,cat"')
    from .embedded.scenes import OBJECTS

    return list(OBJECTS)


def _example_pictures() -> list[Path]:
    return sorted((Path(__file__).parent / "embedded" / "examples").glob("*.png"))


def _expand(pictures: Sequence[Path]) -> Iterator[Path]:
    """Yield files as they are, and the pictures below folders in sorted order."""
    for path in pictures:
        if path.is_dir():
            yield from sorted(p for p in path.rglob("*") if p.suffix.lower() in _PICTURE_SUFFIXES and p.is_file())
        else:
            yield path


def _classify_all(
    clf: RobustClassifier, paths: Sequence[Path], *, plain: bool, as_json: bool, on_error: OnError, top_k: int
) -> int:
    """Print an answer per picture; return how many could not be read."""
    n_failed = 0
    show_progress = len(paths) >= _PROGRESS_FROM and _err.is_terminal
    with Progress(console=_err, disable=not show_progress, transient=True) as progress:
        for path in progress.track(paths, description="classifying"):
            try:
                explanation = clf.explain(path, top_k=top_k)
            except InvalidImageError as error:
                if on_error is OnError.raise_:
                    raise
                n_failed += 1
                _say(f"{_shown(path)}: {error}", "red")
                if on_error is OnError.return_:
                    _print_json({"file": _shown(path), "error": {"code": error.code, "message": error.message}})
                continue
            if as_json:
                _print_json({"file": _shown(path), **_json_of(explanation, plain)})
            else:
                _print_table(path, explanation, plain)
    return n_failed


def _classify_with_bundle(
    folder: str,
    paths: Sequence[Path],
    chosen: Sequence[str] | None,
    template: str,
    *,
    as_json: bool,
    on_error: OnError,
    top_k: int,
) -> None:
    """Print an answer per picture, without torch."""
    from .export.runtime import OnnxClassifier

    clf = OnnxClassifier(folder)
    if chosen is not None:
        clf.set_labels(chosen, template)
    n_failed = 0
    answers = clf.stream(paths, on_error="raise" if on_error is OnError.raise_ else "return", top_k=top_k)
    for path, answer in zip(paths, answers, strict=True):
        if isinstance(answer, InvalidImageError):
            n_failed += 1
            _say(f"{_shown(path)}: {answer}", "red")
            if on_error is OnError.return_:
                _print_json({"file": _shown(path), "error": {"code": answer.code, "message": answer.message}})
        elif as_json:
            _print_json({"file": _shown(path), "robust": answer})
        else:
            _put(_shown(Path(path.name)), "bold")
            for row in answer:
                _put(f"  {100 * row['score']:5.1f} %  {row['label']}")
    if n_failed:
        _say(f"{n_failed} of {len(paths)} pictures could not be read")
        raise typer.Exit(EXIT_INPUTS)


def _shown(path: Path) -> str:
    """Return a path as text that can be printed: bytes of a name that are no UTF-8 become escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _json_of(explanation: Explanation, plain: bool) -> dict[str, Any]:
    fields = explanation.to_dict()
    if plain:
        return {"plain": fields["plain"], "warnings": fields["warnings"]}
    del fields["heatmap"]
    return fields


def _print_json(fields: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(fields, ensure_ascii=False) + "\n")


def _print_table(path: Path, explanation: Explanation, plain: bool) -> None:
    scores = {side: {p["label"]: p["score"] for p in getattr(explanation, side)} for side in ("plain", "robust")}
    table = Table("", "plain CLIP", *([] if plain else ["defended"]), box=None, pad_edge=False)
    shown = scores["plain"] if plain else {**scores["robust"], **scores["plain"]}
    for label in sorted(
        shown, key=lambda name: -max(scores["plain"].get(name, 0), 0 if plain else scores["robust"].get(name, 0))
    ):
        cells = [_cell(scores["plain"], label)] + ([] if plain else [_cell(scores["robust"], label)])
        table.add_row(f"  {label}", *cells)
    _put(_shown(Path(path.name)), "bold")
    _out.print(table)
    if not plain:
        _put(f"  {_what_was_removed(explanation)}\n")


def _cell(scores: dict[str, float], label: str) -> str:
    return f"{100 * scores[label]:5.1f} %" if label in scores else "      -"


def _what_was_removed(explanation: Explanation) -> str:
    if not explanation.removed:
        return "nothing was removed: the answer is stock CLIP's, bit for bit"
    names = ", ".join(dict.fromkeys(item.set_name for item in explanation.removed))
    n_patches = int((explanation.heatmap > 0).sum())
    return (
        f"removed: {names}; {len(explanation.removed)} latents on {n_patches} of {explanation.heatmap.size} patches, "
        f"{100 * explanation.fraction:.1f} % of the residual"
    )


def _print_next_step() -> None:
    _say(
        'Your own picture:     defense classify PICTURE --labels "dog,cat"\n'
        "This is the embedded model, a miniature CLIP that knows a hundred drawn things. For photographs, give a\n"
        "full-size one and a defense that was fitted on it:\n"
        "                      defense classify PICTURE --labels ... --defense DIR --model ViT-B-32 --pretrained TAG"
    )


@app.command()
def export(
    out: Annotated[Path, typer.Argument(help="Folder to write; it must not exist, or be empty.")],
    labels: Annotated[str | None, typer.Option(help='Labels to bake in, e.g. "dog,cat".')] = None,
    labels_file: Annotated[Path | None, typer.Option(help="The same, one label a line.")] = None,
    template: Annotated[str, typer.Option(help='"simple", "hf", "openai", or a template with {}.')] = "simple",
    defense: Annotated[str, typer.Option(help='"embedded", a folder, or a hub id.')] = "embedded",
    model: Annotated[str | None, typer.Option(help="open_clip model; by default the one the defense names.")] = None,
    pretrained: Annotated[str | None, typer.Option(help="open_clip's tag of its weights.")] = None,
    mode: Annotated[Mode, typer.Option(help="How a TopK SAE is written.")] = Mode.exact,
    dtype: Annotated[Dtype, typer.Option(help="fp16 is for CUDA, int8 for CPUs.")] = Dtype.fp32,
    text: Annotated[bool, typer.Option("--text", help="Add the text tower, for labels chosen at run time.")] = False,
    layout: Annotated[Layout, typer.Option(help="A server's files around the same bundle.")] = Layout.bundle,
) -> None:
    """Write a defended CLIP as ONNX, checked against PyTorch, with all that it takes to run it without."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with _exit_codes():
        from .classifier import EMBEDDED, RobustClassifier

        try:
            from .export.exporter import export_onnx
        except ModuleNotFoundError as error:
            raise MissingDependencyError(error.name or "onnxscript", "export") from error

        chosen = _chosen_labels(labels, labels_file, defense == EMBEDDED and model in (None, EMBEDDED))
        clf = RobustClassifier.from_pretrained(defense, model=model, pretrained=pretrained, device="cpu")
        clf.set_labels(chosen, template)
        with _err.status("tracing and checking") if _err.is_terminal else nullcontext():
            report = export_onnx(clf, out, mode=mode.value, dtype=dtype.value, text=text, layout=layout.value)
        _print_report(report)


def _print_report(report: ExportReport) -> None:
    _put(f"bundle      {_shown(report.folder)}, {report.mode}, {report.dtype}, {report.model_bytes / 2**20:.1f} MiB")
    _put(f"manifest    {report.manifest_sha256}")
    for name, parity in (("pictures", report.parity), ("texts", report.text_parity)):
        if parity is not None:
            _put(
                f"{name:11} {parity.rows}, batches of {', '.join(map(str, parity.batches))}: max difference to PyTorch "
                f"{parity.max_abs_diff:.1e}, same label {100 * parity.agreement:.1f} %"
            )
    _say(f"Check it again anywhere: defense info {_shown(report.folder)}")


@app.command()
def info(
    source: Annotated[str, typer.Argument(help='"embedded", a folder, or a hub id.')] = "embedded",
    expect: Annotated[str | None, typer.Option(help="sha256 that the manifest must have.")] = None,
    check: Annotated[bool, typer.Option(help="Load the host and recompute the golden vectors.")] = False,
    model: Annotated[str | None, typer.Option(help="open_clip model for --check.")] = None,
    pretrained: Annotated[str | None, typer.Option(help="open_clip's tag for --check.")] = None,
) -> None:
    """Say what a defense or an exported bundle is, after checking every byte of it."""
    with _exit_codes():
        from .classifier import find_defense
        from .export import bundle

        if bundle.is_bundle(source):
            _print_bundle(source, expect)
            return
        defense = find_defense(source)
        manifest = defense.manifest_sha256
        _check_pinned(manifest, expect)
        tag = f", {defense.host.pretrained}" if defense.host.pretrained else ""
        _put(f"host        {defense.host.model}{tag}, weights {defense.host.sha256[:16]}")
        _put(f"manifest    {manifest}")
        _put(f"licence     {defense.licence}")
        for site in defense.sites:
            sae = site.sae_config
            _put(f"site        {site.hook_point}: {sae['act']} SAE, {sae['d_sae']} latents")
            for latent_set in site.sets:
                _put(
                    f"  set       {latent_set.name}: {len(latent_set.latents)} latents, edit {latent_set.edit}, "
                    f"tokens {latent_set.scope}"
                )
        for key, value in defense.provenance.items():
            _put(f"{key:11} {value}")
        if check:
            _check_golden(defense, source, model, pretrained)


def _check_pinned(manifest: str | None, expect: str | None) -> None:
    if expect is not None and expect != manifest:
        raise CheckpointError(f"the manifest's sha256 is {manifest}, not {expect}: it was changed, or is another one")


def _print_bundle(source: str, expect: str | None) -> None:
    """Check every byte of a bundle, then that its graph still answers as it did."""
    from .export import bundle
    from .export.runtime import OnnxClassifier

    found = bundle.load(source)
    _check_pinned(found.manifest_sha256, expect)
    host = " ".join(filter(None, (found.host.get("model"), found.host.get("pretrained"))))
    _put(f"host        {host or 'unnamed'}, weights {found.host['sha256'][:16]}")
    _put(f"manifest    {found.manifest_sha256}")
    _put(f"licence     {found.licence}")
    _put(f"graph       {found.model}, {found.mode}, {found.dtype}")
    _put(f"labels      {len(found.prompts.labels)}, {'others by text.onnx' if found.text_model else 'fixed'}")
    for site in found.defense["sites"] if found.defense else ():
        _put(f"site        {site['hook_point']}: {site['act']} SAE, {site['d_sae']} latents")
        for each in site["sets"]:
            _put(f"  set       {each['name']}: {each['latents']} latents, edit {each['edit']}, tokens {each['scope']}")
    try:
        clf = OnnxClassifier(source, verify="size")  # the bytes were checked above
    except MissingDependencyError as error:
        _say(f"golden embeddings not checked: {error}")
        return
    _put(f"golden      reproduced on {clf.running_on}, max difference {clf.check_golden():.1e}")


def _check_golden(defense: artefact.Defense, source: str, model: str | None, pretrained: str | None) -> None:
    from .classifier import RobustClassifier, golden_difference

    if defense.golden is None:
        raise CheckpointError("this defense holds no golden vectors to check")
    difference = golden_difference(
        RobustClassifier.from_pretrained(source, model=model, pretrained=pretrained, device="cpu")
    )
    if not difference <= 1e-4:  # also where it is NaN
        raise CheckpointError(
            f"golden vectors differ by {difference:.2g}; expected at most 1e-4: this is not the host it was made with"
        )
    _put(f"golden      reproduced, max difference {difference:.1e}")


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="The weights, or the folder that they are alone in.")],
    out: Annotated[Path, typer.Argument(help="Folder to write the SAE to.")],
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            help="auto, prisma, saelens, sparsify, dictionary_learning, patchsae, sae-for-vlm, overcomplete, saev, "
            "clipscope, msae or openai.",
        ),
    ] = "auto",
    config: Annotated[Path | None, typer.Option(help="Its configuration, where that has another place.")] = None,
    hook_point: Annotated[str | None, typer.Option(help='"blocks.{L}.hook_resid_post", or "pooled".')] = None,
    tokens: Annotated[str | None, typer.Option(help='What it was trained on: "cls", "patch" or "all".')] = None,
    act: Annotated[str | None, typer.Option(help='"relu", "jumprelu", "topk", "batchtopk" or "gated".')] = None,
    k: Annotated[int | None, typer.Option(help="Latents kept per token.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Above which activation a latent counts.")] = None,
    norm: Annotated[str | None, typer.Option(help='"none", "layer_norm" or "constant_norm_rescale".')] = None,
    subtract_b_dec: Annotated[bool | None, typer.Option(help="Whether b_dec is subtracted before the encoder.")] = None,
    scaling_factor: Annotated[float | None, typer.Option(help="Residuals are multiplied by it (SAELens).")] = None,
    act_mean: Annotated[Path | None, typer.Option(help="Mean residual, .npy or .safetensors (saev).")] = None,
    scalar: Annotated[float | None, typer.Option(help="Centred residuals are divided by it (saev).")] = None,
    host_model: Annotated[str | None, typer.Option(help="The CLIP it was trained on.")] = None,
    quick_gelu: Annotated[bool | None, typer.Option(help="Whether that CLIP ran with QuickGELU.")] = None,
    licence: Annotated[str, typer.Option(help="Licence of the weights.")] = "not stated",
) -> None:
    """Convert a published SAE checkpoint once, to safetensors and JSON.

    The options state what a file does not say. None is guessed: where one is missing, the import is refused by name.
    """
    with _exit_codes():
        try:
            from . import checkpoint, importers
        except ModuleNotFoundError as error:
            raise MissingDependencyError(error.name or "torch", "torch") from error
        converted = importers.read(
            file,
            format_,
            config=config,
            licence=licence,
            hook_point=hook_point,
            tokens=tokens,
            act=act,
            k=k,
            threshold=threshold,
            norm=norm,
            subtract_b_dec=subtract_b_dec,
            scaling_factor=scaling_factor,
            act_mean=None if act_mean is None else importers.read_vector(act_mean),
            scalar=scalar,
            host_model=host_model,
            quick_gelu=quick_gelu,
        )
        checkpoint.save(converted, out)
        _put(f"written     {_shown(out)}")
        _put(f"format      {converted.provenance['format']}")
        for key, value in converted.sae.config.to_dict().items():
            _put(f"{key:11} {value}")
        _put(f"hook point  {converted.hook_point}")
        _put(f"host        {converted.host_model or 'not stated'}")
        _put("golden      residuals, acts and reconstructions stored, and reproduced from the files")


@app.command()
def bench(
    suite: Annotated[str, typer.Argument(help='"typographic", "waterbirds", "celeba", "all", or one data set.')],
    data: Annotated[Path, typer.Option(help="The folder that holds the data sets' folders.")] = Path("data"),
    model: Annotated[str | None, typer.Option(help="open_clip model; by default the one the defense names.")] = None,
    pretrained: Annotated[str | None, typer.Option(help='open_clip\'s tag of its weights, or "random".')] = None,
    defense: Annotated[str | None, typer.Option(help='"embedded", a folder, or a hub id.')] = None,
    methods: Annotated[str, typer.Option(help='E.g. "zero-shot,defense,defense@0.5".')] = "zero-shot,defense",
    out: Annotated[Path, typer.Option(help="Where results, tables and plots go; a second run goes on there.")] = Path(
        "results"
    ),
    allow_partial: Annotated[bool, typer.Option("--allow-partial", help="Take data that are not all there.")] = False,
    font: Annotated[Path | None, typer.Option(help="Font file for drawn words.")] = None,
    seed: Annotated[int, typer.Option(help="Of drawn words and intervals.")] = 0,
    device: Annotated[str, typer.Option(help='"auto", "cpu", "cuda".')] = "auto",
) -> None:
    """Measure methods on data sets that attack CLIP with words or spurious cues."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with _exit_codes():
        from .benchmarks import datasets, robust, tables
        from .benchmarks.methods import make_methods
        from .classifier import find_defense

        options = datasets.Options(allow_partial, font, seed)
        tasks, missing = datasets.read_tasks(suite, data, options)
        if missing:
            _say(f"not in {data}, left out: {', '.join(missing)}")
        found = None if defense is None else find_defense(defense)
        chosen = make_methods([name.strip() for name in methods.split(",")], found)
        if model is None:
            if found is None:
                raise typer.BadParameter("--model is missing, e.g. --model ViT-B-32 --pretrained openai")
            model, pretrained = found.host.model, found.host.pretrained
        host = robust.load_named_host(model, pretrained, device=device)
        with Progress(console=_err, disable=not _err.is_terminal, transient=True) as progress:

            def track(chunks: Sequence[Any], what: str) -> Iterable[Any]:
                return progress.track(chunks, description=what)

            command = shlex.join(sys.argv)
            results = robust.run(host, tasks, chosen, out, seed=seed, command=command, track=track)
        _put(tables.markdown(results))
        robust.report(out)
        n_unreadable = sum(result["robust"]["n_unreadable"] for result in results)
        if n_unreadable:
            _say("some pictures could not be read; the results name them", "red")
            raise typer.Exit(EXIT_INPUTS)


@app.command()
def train(
    pictures: Annotated[
        list[Path], typer.Argument(help="Folders with pictures, .tar (WebDataset) or .parquet files; or such files.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the SAE.")],
    block: Annotated[int, typer.Option(min=0, help="Block after which residuals are taken, counted from 0.")],
    model: Annotated[str, typer.Option(help="open_clip model.")] = "embedded",
    pretrained: Annotated[str | None, typer.Option(help="open_clip's tag of its weights.")] = None,
    variant: Annotated[Variant, typer.Option(help="Which latents count.")] = Variant.batchtopk,
    d_sae: Annotated[int | None, typer.Option(help="Latents; by default 16 times the width of the residual.")] = None,
    k: Annotated[int, typer.Option(help="Latents kept per token. Not for relu.")] = 32,
    l1: Annotated[float, typer.Option(help="Weight of the penalty. For relu.")] = 0.01,
    tokens: Annotated[Tokens, typer.Option(help="Which tokens.")] = Tokens.all,
    n_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens to train on; pictures come again as needed.")
    ] = 10_000_000,
    batch: Annotated[int, typer.Option(min=1, help="Tokens per step, over all processes.")] = 4096,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; by default it follows from --d-sae.")] = None,
    buffer: Annotated[int, typer.Option(min=1, help="Tokens in the shuffle buffer, over all processes.")] = 2**17,
    text_rate: Annotated[float, typer.Option(min=0, max=1, help="Share of pictures to write a word on.")] = 0.0,
    shards: Annotated[Path | None, typer.Option(help="Keep the residuals in this folder and read them there.")] = None,
    labels_file: Annotated[
        Path | None, typer.Option(help="Classes, one a line: measure what the SAE costs in zero-shot accuracy.")
    ] = None,
    licence: Annotated[str, typer.Option(help="Of the SAE; SPDX identifier.")] = "not stated",
    seed: Annotated[int, typer.Option(min=0, help="Of weights, order and writing.")] = 0,
    device: Annotated[str, typer.Option(help='"auto", "cpu", "cuda".')] = "auto",
) -> None:
    """Train an SAE on a CLIP's residuals. Run again after an interruption, it goes on where it was saved last.

    On several GPUs or machines: torchrun --nproc-per-node 8 --no-python defense train ...
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with _exit_codes():
        from . import checkpoint, parallel
        from .activations import Stream, Tap, host_spec
        from .classifier import load_host, resolve_device
        from .labels import read_labels
        from .pictures import open_pictures
        from .train import TrainConfig, train_checkpoint

        checkpoint.check_target(out)
        names = () if labels_file is None else read_labels(labels_file)
        source = open_pictures(pictures)
        place = parallel.local_device(resolve_device(device))
        with parallel.joined(place) as world:
            host = load_host(model, pretrained, device=place)
            tap = Tap(host, f"blocks.{block}.hook_resid_post", tokens.value)
            stream = Stream(tap, source, buffer=buffer, text_rate=text_rate, seed=seed, world=world)
            config = TrainConfig(
                d_sae=d_sae or 16 * tap.vision.d_model,
                k=None if variant is Variant.relu else k,
                steps=-(-n_tokens // batch),
                batch=batch,
                lr=lr,
                seed=seed,
                variant=variant.value,
                l1=l1,
            )
            with Progress(console=_err, disable=not (world.is_first and _err.is_terminal), transient=True) as progress:
                task = progress.add_task("training", total=config.steps)
                trained = train_checkpoint(
                    stream, config, host_spec(host, model, pretrained), names=names, shards=shards,
                    state=out.with_name(f"{out.name}.state.safetensors"), licence=licence,
                    report=lambda now: progress.update(
                        task, completed=now.step, description=f"loss {now.loss:.3f}, {now.n_dead} dead"
                    ),
                )  # fmt: skip
            if world.is_first:
                checkpoint.save(trained, out)
                _print_training(trained.provenance)
        if stream.unreadable and world.is_first:  # torchrun ends the others as soon as one gives an error code
            _say(f"{len(stream.unreadable)} pictures could not be read and were left out")
            raise typer.Exit(EXIT_INPUTS)


def _print_training(provenance: Mapping[str, Any]) -> None:
    quality, zero_shot = provenance["quality"], provenance["zero_shot"]
    _put(f"explained variance  {quality['explained_variance']:.4f}")
    _put(f"latents per token   {quality['l0']:.1f}")
    _put(f"latents that fire   {100 * quality['alive']:.1f} %")
    if zero_shot is not None:
        _put(
            f"zero-shot           {100 * zero_shot['spliced']:.1f} % with the reconstruction, "
            f"{100 * zero_shot['plain']:.1f} % without, n = {zero_shot['n']}"
        )


@app.command()
def doctor() -> None:
    """List what is installed and what is wrong with it."""
    for package in (
        "clip-defense",
        "torch",
        "torchvision",
        "open_clip_torch",
        "triton",
        "onnxruntime",
        "onnxruntime-gpu",
        "onnx",
        "onnxscript",
        "gradio",
        "pillow",
    ):
        try:
            found = version(package)
        except PackageNotFoundError:
            found = "not installed"
        _put(f"{package:18} {found}")
    problems = list(_problems())
    for problem in problems:
        _say(f"problem: {problem}", "red")
    if problems:
        raise typer.Exit(EXIT_MISSING)


def _problems() -> Iterator[str]:
    from .export.sessions import installed_wheels

    if len(installed_wheels()) > 1:
        yield (
            "onnxruntime and onnxruntime-gpu overwrite each other; run: pip uninstall -y onnxruntime onnxruntime-gpu, "
            'then pip install "clip-defense[onnx]" or "clip-defense[onnx-gpu]"'
        )
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError:
        return  # not installed, which the list says
    except ImportError as error:
        yield f'torch cannot be imported ({error}); the torch backend needs: pip install "clip-defense[torch]"'
        return
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:
        yield f"torch and torchvision do not belong together ({error}); reinstall both in one pip command"


@app.callback(invoke_without_command=True)
def _root(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if show_version:
        _put(version("clip-defense"))
        raise typer.Exit


def main() -> None:
    """Run the command line."""
    app()
