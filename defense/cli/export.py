"""`defense export`: a defended CLIP as ONNX."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from defense.cli.common import (
    DefenseSource,
    LabelsFile,
    OtherModel,
    Pretrained,
    Template,
    app,
    check_pretrained,
    chosen_labels,
    exit_codes,
    log_warnings,
    put,
    say,
    shipped_model,
    shown,
)
from defense.errors import cannot_import
from defense.export.layouts import Dtype, Layout, Mode  # the one module on top that a command needs for its options
from defense.hosts.shipped import DEFAULT

if TYPE_CHECKING:
    from defense.export.exporter import ExportReport


@app.command()
def export(
    out: Annotated[Path, typer.Argument(help="Folder to write; it must not exist, or be empty.")],
    labels: Annotated[str | None, typer.Option(help='Labels to bake in, e.g. "dog,cat".')] = None,
    labels_file: LabelsFile = None,
    template: Template = "simple",
    defense: DefenseSource = DEFAULT,
    model: OtherModel = None,
    pretrained: Pretrained = None,
    mode: Annotated[Mode, typer.Option(help="How a TopK SAE is written.")] = "exact",
    dtype: Annotated[Dtype, typer.Option(help="fp16 is for CUDA, int8 for CPUs.")] = "fp32",
    text: Annotated[bool, typer.Option("--text", help="Add the text tower, for labels chosen at run time.")] = False,
    layout: Annotated[Layout, typer.Option(help="A server's files around the same bundle.")] = "bundle",
) -> None:
    """Write a defended CLIP as ONNX, checked against PyTorch, with all that it takes to run it without."""
    log_warnings()
    with exit_codes():
        from defense.classify.classifier import RobustClassifier

        try:
            from defense.export.exporter import export_onnx, free_target
        except (ImportError, OSError) as error:
            raise cannot_import("onnxscript", error) from error

        check_pretrained(model, pretrained, defense)
        chosen = chosen_labels(labels, labels_file, shipped_model(defense, model), defense, needs_own=True)
        free_target(out)
        start = time.monotonic()

        def tell(stage: str) -> None:
            say(f"{time.monotonic() - start:4.0f} s  {stage}")

        tell("loading the CLIP and the defense")
        clf = RobustClassifier.from_pretrained(defense, model=model, pretrained=pretrained, device="cpu")
        clf.set_labels(chosen, template)
        report = export_onnx(clf, out, mode=mode, dtype=dtype, text=text, layout=layout, tell=tell)
        _print_report(report)


def _print_report(report: ExportReport) -> None:
    put(f"bundle      {shown(report.folder)}, {report.mode}, {report.dtype}, {report.model_bytes / 2**20:.1f} MiB")
    put(f"manifest    {report.manifest_sha256}")
    for name, parity in (("pictures", report.parity), ("texts", report.text_parity)):
        if parity is not None:
            put(
                f"{name:11} {parity.rows}, batches of {', '.join(map(str, parity.batches))}: max difference to PyTorch "
                f"{parity.max_abs_diff:.1e}, same label {100 * parity.agreement:.1f} %"
            )
    say(f"Check it again anywhere: defense info {shown(report.folder)}")
