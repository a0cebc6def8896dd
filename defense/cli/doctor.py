"""`defense doctor`: what is installed and what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import typer

from defense.cli.common import EXIT_MISSING, app, exit_codes, put, say
from defense.errors import install_command


@app.command()
def doctor() -> None:
    """List what is installed and what is wrong with it."""
    with exit_codes():
        _print_packages()
        problems = list(_problems())
        for problem in problems:
            say(f"problem: {problem}", "red")
        if problems:
            raise typer.Exit(EXIT_MISSING)


def _print_packages() -> None:
    for package in (
        "clip-defense",
        "torch",
        "torchvision",
        "open_clip_torch",
        "transformers",
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
        put(f"{package:18} {found}")


def _problems() -> Iterator[str]:
    from defense.export.sessions import installed_wheels

    if len(installed_wheels()) > 1:
        yield (
            "onnxruntime and onnxruntime-gpu overwrite each other; run: pip uninstall -y onnxruntime onnxruntime-gpu, "
            f"then {install_command('onnx')}, or the same with onnx-gpu"
        )
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError:
        return  # not installed, which the list says
    except (ImportError, OSError, RuntimeError) as error:  # OSError: a library that it links to is not there
        yield f"torch cannot be imported ({error}); the torch backend needs: {install_command('torch')}"
        return
    try:
        import torchvision  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        yield f"torch and torchvision do not belong together ({error}); reinstall both in one pip command"
