"""Native code talks to nobody and leaves nothing in HOME: what runs ONNX Runtime, watched from outside of the process.

Patching Python's sockets would see none of it: ONNX Runtime has its own. The files that it leaves where telemetry is on
come first, within the import; its first lookup of a name comes seconds later.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("open_clip")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from ..demo import serving

VARIABLE = "ORT_DISABLE_TELEMETRY"
_LOCAL = re.compile(r'inet_addr\("127\.|inet_pton\(AF_INET6, "::1"')
_SENT = re.compile(r"(connect|sendto|sendmsg|sendmmsg)\(.*sa_family=AF_INET")
_LOOKUP = re.compile(r"htons\(53\)|nscd/socket|/etc/resolv\.conf")


def _can_trace() -> bool:
    strace = shutil.which("strace")
    return strace is not None and subprocess.run([strace, "true"], capture_output=True, check=False).returncode == 0


needs_strace = pytest.mark.skipif(not _can_trace(), reason="needs strace, and leave to trace (apt install strace)")


class Quiet:
    """An empty HOME and an empty TMPDIR, and who was talked to by a process that had them."""

    def __init__(self, folder: Path) -> None:
        self.home, self.temporary, self.trace = folder / "home", folder / "tmp", folder / "trace"
        for each in (self.home, self.temporary):
            each.mkdir()

    def run(self, *command: object, cwd: Path | None = None, traced: bool = True) -> str:
        """Run a command that must succeed, with nothing that says whether it may talk; return what it printed."""
        environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
        environment |= {"HOME": str(self.home), "TMPDIR": str(self.temporary)}
        environment.pop("XDG_CACHE_HOME", None)
        watched = ["strace", "-f", "-qq", "-e", "trace=%network,open,openat", "-o", str(self.trace)] if traced else []
        done = subprocess.run(
            [*watched, *map(str, command)], cwd=cwd, env=environment, stdin=subprocess.DEVNULL, text=True,
            capture_output=True, check=False, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def left(self) -> list[str]:
        """Return the files in HOME, and those in TMPDIR."""
        files = [path for folder in (self.home, self.temporary) for path in folder.rglob("*") if path.is_file()]
        return [path.relative_to(self.home.parent).as_posix() for path in files]

    def talked(self) -> list[str]:
        """Return the calls that looked up a name or sent something to another machine."""
        lines = self.trace.read_text(encoding="utf-8", errors="replace").splitlines()
        assert any(".so" in line for line in lines), "nothing was traced"
        return [line for line in lines if _LOOKUP.search(line) or (_SENT.search(line) and not _LOCAL.search(line))]


@pytest.fixture
def quiet(tmp_path) -> Quiet:
    folder = tmp_path / "outside"
    folder.mkdir()
    return Quiet(folder)


@pytest.fixture
def picture(tmp_path) -> Path:
    Image.fromarray(np.full((40, 40, 3), 200, np.uint8)).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


CLASSIFY = """
import sys, time
from defense.export.runtime import OnnxClassifier
print(OnnxClassifier(sys.argv[1])(sys.argv[2])[0]["label"])
time.sleep(float(sys.argv[3]))
"""
VERIFY = """
import sys
from pathlib import Path
import numpy as np
from defense.export import verify
rows = np.zeros((verify.N_ROWS, 3, 32, 32), np.float32)
axes = {"pixel_values": ["batch", 3, 32, 32]}
verify._run(Path(sys.argv[2]), Path(sys.argv[1]), verify.Expected({"pixel_values": rows}, axes, {}, {}), {})
"""


@needs_strace
def test_the_tracer_sees_what_native_code_looks_up_and_sends(quiet):
    code = "import socket\ntry: socket.getaddrinfo('telemetry.invalid', 443)\nexcept OSError: pass"
    quiet.run(sys.executable, "-P", "-c", code)
    assert quiet.talked()
    code = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'', ('192.0.2.1', 9))"
    quiet.run(sys.executable, "-P", "-c", f"try: exec({code!r})\nexcept OSError: pass")
    assert quiet.talked()


@needs_strace
@pytest.mark.parametrize("seconds", [0, pytest.param(25, marks=pytest.mark.slow)])
def test_the_runtime_says_nothing(quiet, tiny_bundle, picture, seconds):
    assert quiet.run(sys.executable, "-P", "-c", CLASSIFY, tiny_bundle, picture, seconds).strip()
    assert quiet.talked() == []
    assert quiet.left() == []


@needs_strace
def test_verification_says_nothing(quiet, tiny_bundle, tmp_path):
    (tmp_path / "job").mkdir()
    quiet.run(sys.executable, "-P", "-c", VERIFY, tiny_bundle / "model.onnx", tmp_path / "job")
    assert (tmp_path / "job" / "outputs.safetensors").is_file()
    assert quiet.talked() == []
    assert quiet.left() == []


@needs_strace
def test_a_demo_of_a_bundle_says_nothing(quiet, tiny_bundle):
    pytest.importorskip("gradio")
    assert quiet.run(sys.executable, "-P", serving.__file__, tiny_bundle, "{}").startswith("http://127.0.0.1")
    assert quiet.talked() == []
    assert quiet.left() == []


def test_what_the_container_runs_leaves_nothing(quiet, tiny_bundle, picture):
    dockerfile = (tiny_bundle / "Dockerfile").read_text(encoding="utf-8")
    assert "&& defense info /bundle" in dockerfile
    main = [sys.executable, "-P", "-c", "from defense.cli import main; main()"]
    for arguments in (["info", tiny_bundle], ["classify", "--defense", tiny_bundle, picture, "--json"]):
        quiet.run(*main, *arguments, traced=False)
    assert quiet.left() == []


def test_the_code_for_onnxruntime_alone_leaves_nothing(quiet, tiny_bundle, picture, tmp_path):
    (block,) = re.findall(
        r"```python\n(import json.*?)```", (tiny_bundle / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    assert "defense" not in block
    code = block.replace('"picture.jpg"', repr(str(picture)))
    assert quiet.run(sys.executable, "-P", "-c", code, cwd=tiny_bundle, traced=False).strip()
    assert quiet.left() == []


def test_who_allows_telemetry_is_not_overruled():
    code = f"import defense, os; print(os.environ[{VARIABLE!r}])"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={**os.environ, VARIABLE: "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "0"
