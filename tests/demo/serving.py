"""Demo servers in a process of their own: Gradio leaves event loops open, which would count as warnings here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import SimpleNamespace
from typing import Any

STUCK = "stuck"
WITHOUT_TORCH = ("torch", "open_clip", "onnx", "onnxscript")


class NotInstalled(MetaPathFinder):
    """Finds none of `WITHOUT_TORCH`. A None in `sys.modules` would not do: scipy takes that for an imported torch."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname.partition(".")[0] in WITHOUT_TORCH:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


@contextmanager
def served(
    what: str | Path = "embedded", environment: Mapping[str, str] | None = None, **options: Any
) -> Iterator[str]:
    """Serve a demo in another process, and yield its address.

    Args:
        what: "embedded"; `STUCK`, whose model never answers; or a bundle's folder, without torch.
        environment: Variables beside those of this process.
        options: See `defense.demo.app.serving`.
    """
    command = [sys.executable, "-P", __file__, str(what), json.dumps(options)]
    variables = {**os.environ, **(environment or {})}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=variables, **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.stdin.close()
            process.wait(60)


def main(what: str, options: Mapping[str, Any]) -> None:
    """Serve until stdin ends."""
    if what != "embedded":
        sys.meta_path.insert(0, NotInstalled())
    from defense.demo.app import serving
    from defense.demo.engine import DemoTask, Engine
    from defense.demo.loading import bundled, defended

    never = threading.Event()

    class Stuck(Engine):
        def classify(self, *_arguments, **_options):
            never.wait()
            return []

    if what == STUCK:
        engine = Stuck(SimpleNamespace(bundle=SimpleNamespace(text_model=None)), (DemoTask("", "", ("dog", "cat")),))
    else:
        engine = defended(what, device="cpu") if what == "embedded" else bundled(what)
    with serving(engine, **options) as address:
        print(address, flush=True)  # noqa: T201
        sys.stdin.read()
        never.set()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
