"""The command in surroundings that it did not choose: broken packages, signals, full disks, odd paths, no network."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("open_clip")

from defense.cli.common import print_json
from defense.hosts.clip import embedded_folder
from defense.hosts.shipped import DEFAULT, MODELS

APPLE = embedded_folder("examples") / "apple-pizza.png"
CAT = MODELS[DEFAULT].folder("examples") / "cat-hammer.jpg"
COMMAND = "import sys; from defense.cli import main; sys.argv = ['defense', *sys.argv[1:]]; main()"


def run(*arguments: object, code: str = COMMAND, cwd: Path | None = None, **environment: str | None):
    """Run code in a process of its own; a variable that is None is not set there."""
    variables = {name: value for name, value in {**os.environ, **environment}.items() if value is not None}
    command = [sys.executable, "-P", "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, env=variables, cwd=cwd, check=False, timeout=240)


def said(done: subprocess.CompletedProcess) -> str:
    """What stands on stderr, as one line: the command wraps it."""
    text = done.stderr.decode("utf-8", "replace")
    assert "Traceback" not in text, text
    return " ".join(text.split())


# --- fault 69: packages that do not belong together -------------------------------------------------------------------


def broken(folder: Path, **modules: str) -> str:
    """Write modules that raise what they are given, and return what puts them first."""
    for name, error in modules.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(f"raise {error}\n")
    return str(folder)


@pytest.mark.parametrize(
    ("module", "error", "message"),
    [
        ("torchvision", "RuntimeError('operator torchvision::nms does not exist')", "do not belong together (operator"),
        ("torchvision", "OSError('libc10_cuda.so: no such file')", "do not belong together (libc10_cuda.so"),
        ("torch", "OSError('libcublas.so.13: no such file')", "torch cannot be imported (libcublas.so.13"),
        ("torch", "ImportError('libcudart.so.12: undefined symbol')", "torch cannot be imported (libcudart.so.12"),
    ],
    ids=["operator", "vision-library", "library", "symbol"],
)  # fmt: skip
def test_fault_69_doctor_names_a_package_that_is_there_and_cannot_be_imported(tmp_path, module, error, message):
    path = broken(tmp_path / "first", **{module: error})
    done = run("doctor", PYTHONPATH=path)
    assert message in said(done)
    assert done.returncode == 3
    assert module in done.stdout.decode()


def test_fault_69_with_both_wheels_doctor_says_so_and_the_package_can_be_imported(tmp_path):
    for wheel in ("onnxruntime", "onnxruntime_gpu"):
        (tmp_path / f"{wheel}-1.31.0.dist-info").mkdir()
        (tmp_path / f"{wheel}-1.31.0.dist-info" / "METADATA").write_text(f"Name: {wheel}\nVersion: 1.31.0\n")
    done = run("doctor", PYTHONPATH=str(tmp_path))
    assert done.returncode == 3
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in said(done)


def test_fault_69_the_package_can_be_imported_beside_a_broken_torch(tmp_path):
    path = broken(tmp_path / "first", torch="OSError('libcublas.so.13')", torchvision="RuntimeError('nms')")
    code = (
        "import defense; from defense import errors; import defense.export.runtime; print(errors.ConfigError.__name__)"
    )
    done = run(code=code, PYTHONPATH=path)
    assert (done.returncode, done.stdout.strip()) == (0, b"ConfigError"), done.stderr
    assert run("--help", PYTHONPATH=path).returncode == 0


# --- fault 75: interrupted, or no room left ---------------------------------------------------------------------------


def test_fault_75_a_real_interrupt_ends_with_130_after_whole_lines(tmp_path):
    for i in range(12):
        shutil.copy(APPLE, tmp_path / f"{i:02}.png")
    code = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it, as nohup does
from defense.data import images
decode, seen = images.decode, []
def interrupted(*arguments, **options):
    seen.append(1)
    if len(seen) == 7:
        os.kill(os.getpid(), signal.SIGINT)
    return decode(*arguments, **options)
images.decode = interrupted
from defense.cli import main
sys.argv = ["defense", *sys.argv[1:]]
main()
"""
    done = run("classify", tmp_path, "--json", "--device", "cpu", code=code)
    assert "interrupted" in said(done)
    assert done.returncode == 130
    for line in done.stdout.decode().splitlines():
        json.loads(line)


def test_fault_75_a_disk_without_room_leaves_what_was_there(tmp_path):
    code = """
import json, resource, sys
from pathlib import Path
import numpy as np
from defense.core.config import SAEConfig
from defense.core.sae import SparseAutoencoder
from defense.store import checkpoint, folders

def made(seed):
    rng, config = np.random.default_rng(seed), SAEConfig(d_model=16, d_sae=64, act="relu")
    parameters = {name: rng.normal(size=shape).astype(np.float32) for name, shape in config.parameter_shapes.items()}
    return checkpoint.Checkpoint(SparseAutoencoder(config, parameters), "pooled")

folder = Path(sys.argv[1])
checkpoint.save(made(0), folder / "sae")
(folder / "notes.txt").write_text("before")
names, before = sorted(path.name for path in folder.iterdir()), (folder / "sae" / "sae.json").read_bytes()
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
failed = 0
try:
    checkpoint.save(made(1), folder / "sae")
except Exception:
    failed += 1
try:
    with folders.replacing(folder / "notes.txt") as partial:
        partial.write_bytes(bytes(10_000))
except OSError:
    failed += 1
assert failed == 2, failed
assert sorted(path.name for path in folder.iterdir()) == names, list(folder.iterdir())
assert (folder / "sae" / "sae.json").read_bytes() == before
assert (folder / "notes.txt").read_text() == "before"
checkpoint.load(folder / "sae")
print("whole")
"""
    done = run(tmp_path, code=code)
    assert (done.returncode, done.stdout.strip()) == (0, b"whole"), done.stderr.decode()


# --- fault 76: where nothing can be kept, in a locale that knows no letters, at a path with all of them ---------------


@pytest.mark.parametrize(
    "home", [None, pytest.param("a file", marks=pytest.mark.slow)], ids=["no-home", "home-that-is-a-file"]
)
def test_fault_76_a_shipped_model_needs_no_home_no_cache_and_no_locale(tmp_path, home):
    (tmp_path / "file").write_text("")
    nowhere = str(tmp_path / "file" / "cache")
    folder = tmp_path / "Bilder mit Abstand \U0001f34e"
    folder.mkdir()
    shutil.copy(CAT, folder / "kätzchen \U0001f34f.jpg")
    done = run(
        "classify", ".", "--json", "--device", "cpu", cwd=folder, HOME=None if home is None else str(tmp_path / "file"),
        XDG_CACHE_HOME=nowhere, XDG_CONFIG_HOME=nowhere, HF_HOME=nowhere, TORCH_HOME=nowhere, MPLCONFIGDIR=nowhere,
        TRITON_CACHE_DIR=nowhere, LC_ALL="C", LANG=None, PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONIOENCODING=None,
    )  # fmt: skip
    assert done.returncode == 0, said(done)
    (line,) = done.stdout.decode("ascii").splitlines()
    found = json.loads(line)
    assert found["robust"][0]["label"] == "Egyptian cat"
    assert found["file"].endswith(".jpg")
    assert said(done) == ""
    assert [path.name for path in folder.iterdir()] == ["kätzchen \U0001f34f.jpg"]


# --- fault 77: no network ---------------------------------------------------------------------------------------------

OFFLINE = """
import socket, sys
def refuse(*arguments, **options):
    raise AssertionError(f"the network was used: {arguments}")
for name in ("connect", "connect_ex", "sendto", "bind"):
    setattr(socket.socket, name, refuse)
socket.getaddrinfo = socket.gethostbyname = socket.create_connection = refuse
from defense.cli import main
for arguments in (["classify", sys.argv[1]], ["info", "--check"]):
    sys.argv = ["defense", *arguments]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code
        print("ended well")
"""


def test_fault_77_the_embedded_model_opens_no_socket():
    done = run(APPLE, code=OFFLINE, HF_HUB_OFFLINE=None)
    assert done.returncode == 0, done.stderr.decode()
    classified, checked, rest = done.stdout.decode().split("ended well\n")
    assert "apple" in classified
    assert "golden" in checked
    assert rest == ""


@contextmanager
def answering(status: int) -> Iterator[str]:
    """A hub that answers everything with one status."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.send_header("content-length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    "status", [None, 401, 404, 503], ids=["nobody-there", "unauthorized", "missing", "unavailable"]
)
def test_fault_77_a_hub_that_gives_nothing_is_one_sentence_and_code_5(tmp_path, status):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}"
    with answering(status) if status else answering(500) as address:
        done = run(
            "classify", APPLE, "--defense", "some-org/some-defense", "--labels", "dog,cat",
            HF_ENDPOINT=address if status else closed, HF_HOME=str(tmp_path / "hub"), HF_HUB_OFFLINE=None,
            HTTP_PROXY=None, HTTPS_PROXY=None, http_proxy=None, https_proxy=None, NO_PROXY="*",
        )  # fmt: skip
    assert "some-org/some-defense" in said(done)
    assert (done.returncode, done.stdout) == (5, b"")
    assert not list((tmp_path / "hub").rglob("*.incomplete"))


# --- fault 50: what a spreadsheet would run ---------------------------------------------------------------------------


@pytest.mark.parametrize("label", ["=HYPERLINK(1)", "+1", "-1", "@SUM(A1)", 'a"b', "a\nb", "a,b"])
def test_fault_50_a_label_is_a_string_in_a_line_of_json(capsys, label):
    print_json({"file": label, "robust": [{"label": label, "score": 1.0}]})
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == {"file": label, "robust": [{"label": label, "score": 1.0}]}
    assert line.startswith("{")
