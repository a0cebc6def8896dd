"""How commands end: what a pipe, a disk, a signal, a console or a missing package does to them."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("open_clip")

from defense.cli import common, progress
from defense.errors import BackendError, MissingDependencyError, cannot_import

from ..command import run

COMMAND = [sys.executable, "-m", "defense"]
posix_only = pytest.mark.skipif(os.name != "posix", reason="pipes and signals of POSIX; runs on Linux and macOS")


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


# --- stdout -----------------------------------------------------------------------------------------------------------

TALKS = """
import sys
from defense.cli import common, doctor, main
doctor._problems = list  # to look for some imports torch
doctor.version = lambda _: "x" * 50000
{}
sys.argv = ["defense", "doctor"]
main()
"""
TALKING = TALKS.format("")
PRINTING = TALKS.format("doctor.put = print")
JSON = TALKS.format('doctor.put = lambda text: common.print_json({"x": text})')


@posix_only
@pytest.mark.parametrize("code", [TALKING, PRINTING, JSON], ids=["rich", "print", "json"])
def test_fault_a_reader_that_goes_ends_the_command_quietly(code):
    reading, writing = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    os.read(reading, 10)
    os.close(reading)
    assert process.communicate(timeout=120)[1] == b""
    assert process.returncode == 141


@posix_only
def test_a_broken_pipe_elsewhere_is_an_error_and_not_quiet(monkeypatch, capsys):
    with pytest.raises(common.typer.Exit) as caught, common.exit_codes():
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")
    assert caught.value.exit_code == 6
    assert "error: Broken pipe" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full; runs on Linux")
@pytest.mark.parametrize("code", [TALKING, PRINTING, JSON], ids=["rich", "print", "json"])
def test_fault_a_full_disk_behind_stdout_is_one_line(code):
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, timeout=120)
    assert done.stderr == b"error: No space left on device\n"
    assert done.returncode == 6


@posix_only
@pytest.mark.parametrize("code", [TALKING, JSON], ids=["rich", "json"])
def test_fault_a_closed_stdout_is_no_traceback(code):
    command = ["sh", "-c", 'exec "$0" -c "$1" >&-', sys.executable, code]
    done = subprocess.run(command, stderr=subprocess.PIPE, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")


ODD = ["[/dog]", "[bold]cat", ":dog:", "[link=x]y", "\\[z"]


def test_fault_labels_are_printed_as_they_are(defense_folder, picture):
    code, out, _ = run("classify", picture, "--labels", ",".join(ODD), "--defense", defense_folder, "--top-k", 5)
    assert code == 0
    for label in ODD:
        assert label in out


def test_fault_file_names_and_messages_are_printed_as_they_are(defense_folder, picture, tmp_path):
    odd = picture.rename(tmp_path / "[bold]:dog:[x].png")
    (tmp_path / "[x] empty.png").write_bytes(b"")
    arguments = ("--labels", "dog,cat", "--defense", defense_folder)
    code, out, err = run("classify", odd, tmp_path / "[x] empty.png", *arguments)
    assert code == 4
    assert odd.name in out
    assert "[x] empty.png" in err


def test_fault_123_no_name_of_a_file_commands_the_terminal(defense_folder, picture, tmp_path):
    """Escape sequences clear the screen or forge lines of output; JSON has the name as it is."""
    name = "a\x1b[2Jb\x9b31m\u202egnp\nc.png"
    odd, empty = picture.rename(tmp_path / name), tmp_path / f"empty {name}"
    empty.write_bytes(b"")
    arguments = (odd, empty, "--labels", "dog,cat", "--defense", defense_folder)
    code, out, err = run("classify", *arguments)
    assert code == 4
    for text in (out, err):
        assert "a\\x1b[2Jb\\x9b31m\\u202egnp\\nc.png" in text
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text)
    assert json.loads(run("classify", *arguments, "--json")[1])["file"] == str(odd)


def test_fault_123_what_the_package_logs_commands_no_terminal(capsys):
    handler = logging.StreamHandler(stream := io.StringIO())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging, "basicConfig", lambda **options: handler.setFormatter(options["handlers"][0].formatter))
        common.log_warnings()
    handler.handle(logging.LogRecord("x", logging.WARNING, "", 0, "left out: %s", ("\x1b]0;x\x07",), None))
    assert stream.getvalue() == "left out: \\x1b]0;x\\x07\n"


@pytest.mark.parametrize(
    "encoding", ["ascii", *(pytest.param(name, marks=pytest.mark.slow) for name in ("latin-1", "cp1252"))]
)
def test_fault_a_console_without_a_character_gets_an_escape(defense_folder, picture, encoding):
    code = """
import sys
from defense.cli import main
for options in ([], ["--json"]):
    sys.argv = ["defense", "classify", *ARGUMENTS, *options]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code
        print("--")
"""
    arguments = [str(picture), "--labels", "\u65e5\u672c,\u00e4pfel", "--defense", str(defense_folder)]
    done = subprocess.run(
        [sys.executable, "-P", "-c", code.replace("*ARGUMENTS", f"*{arguments!a}")],
        capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding}, timeout=240
    )  # fmt: skip
    assert (done.returncode, b"Traceback" in done.stderr) == (0, False), done.stderr
    table, line, _ = done.stdout.decode(encoding).split("--\n")
    assert "\\u65e5\\u672c" in table
    assert {row["label"] for row in json.loads(line)["plain"]} == {"\u65e5\u672c", "\u00e4pfel"}


# --- errors of the system ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "/x/out"),
        PermissionError(errno.EACCES, "Permission denied", b"/x/out"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", Path("/x/out")),
        TimeoutError(errno.ETIMEDOUT, "Connection timed out"),
        OSError("something else"),
    ],
    ids=repr,
)
def test_fault_no_error_of_the_system_is_a_usage_error(capsys, error):
    with pytest.raises(common.typer.Exit) as caught, common.exit_codes():
        raise error
    assert caught.value.exit_code == 6
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert "Errno" not in line
    assert ("/x/out" in line) == (error.filename is not None)


@pytest.mark.parametrize(
    "arguments",
    [
        ("import", "NOWHERE", "OUT"),
        ("import", "HERE", "OUT", "--config", "NOWHERE"),
        ("import", "HERE", "OUT", "--act-mean", "NOWHERE"),
        ("fit", "OUT", "HERE", "--sae", "NOWHERE"),
        ("describe", "NOWHERE", "--pictures", "HERE", "--words", "HERE", "--out", "OUT"),
        ("train", "NOWHERE", "--out", "OUT", "--block", "1"),
    ],
    ids=" ".join,
)
def test_fault_a_path_at_which_nothing_is_is_a_usage_error(tmp_path, picture, arguments):
    places = {"NOWHERE": tmp_path / "nowhere", "HERE": picture, "OUT": tmp_path / "out"}
    code, out, err = run(*(places.get(each, each) for each in arguments))
    assert (code, out) == (2, "")
    assert "is not there" in " ".join(err.replace("\u2502", " ").split())


@pytest.mark.parametrize("command", ["classify", "explain", "export"])
def test_fault_a_defense_that_is_not_there_is_said_before_labels_are_asked_for(tmp_path, picture, command):
    others = {"classify": [picture], "explain": [picture, tmp_path / "x.html"], "export": [tmp_path / "out"]}
    arguments = {"explain": [picture, "--out", tmp_path / "x.html"]}.get(command, others[command])
    code, _, err = run(command, *arguments, "--defense", tmp_path / "nope")
    assert code == 2
    assert "is not there" in err
    assert "--labels" not in err


# --- packages ---------------------------------------------------------------------------------------------------------


def test_fault_a_package_that_is_broken_is_not_called_missing():
    assert isinstance(cannot_import("torch", ImportError("libcudart.so.13: not found")), BackendError)
    assert isinstance(cannot_import("torch", OSError("libcudart.so.13: not found")), BackendError)
    assert isinstance(cannot_import("torch", ModuleNotFoundError("No module", name="torch._C")), BackendError)
    missing = cannot_import("torch", ModuleNotFoundError("No module", name="nowhere.at_all"))
    assert isinstance(missing, MissingDependencyError)
    assert (missing.package, missing.extra) == ("nowhere", "torch")


@pytest.mark.parametrize("broken", ["ImportError('libcudart.so.13')", "OSError('libcudart.so.13')"])
def test_fault_a_broken_torch_is_said_to_be_broken(tmp_path, broken):
    (tmp_path / "first" / "torch").mkdir(parents=True)
    (tmp_path / "first" / "torch" / "__init__.py").write_text(f"raise {broken}")
    code = "import defense; defense.SparseAutoencoder"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "first")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert "BackendError: torch is installed but cannot be imported: libcudart.so.13" in done.stderr


@pytest.mark.parametrize(("package", "extra"), [("torch", "torch"), ("matplotlib", "bench"), ("pyarrow", "parquet")])
def test_fault_a_package_that_some_commands_need_is_named_with_its_extra(capsys, monkeypatch, package, extra):
    monkeypatch.setattr("defense.errors._is_there", lambda _: False)
    with pytest.raises(common.typer.Exit) as caught, common.exit_codes():
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    assert caught.value.exit_code == 3
    assert f"[{extra}]" in capsys.readouterr().err


def test_fault_a_tokenizer_that_needs_transformers_says_so(monkeypatch, tiny_folder, tmp_path):
    import open_clip

    from defense.hosts.clip import load_clip

    def needs_transformers(*_):
        raise ModuleNotFoundError("No module named 'transformers'", name="transformers")

    config = json.loads((tiny_folder / "open_clip_config.json").read_text())["model_cfg"]
    config["text_cfg"]["hf_tokenizer_name"] = "somebody/siglip"
    monkeypatch.setattr("defense.errors._is_there", lambda _: False)
    monkeypatch.setattr(open_clip, "get_tokenizer", needs_transformers)
    monkeypatch.setattr(open_clip, "get_model_config", lambda _: config)
    with pytest.raises(MissingDependencyError, match=r"pip install .*\[transformers\]"):
        load_clip(f"local-dir:{tiny_folder}")


# --- signals ----------------------------------------------------------------------------------------------------------

PUBLISHING = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it, as nohup does
from pathlib import Path
from defense.cli import main, info
from defense.store import folders

def publish(_):
    with folders.publishing(Path(sys.argv[2]), read=print) as staging:
        (staging / "a.txt").write_text("half")
        print("ready", flush=True)
        time.sleep(60)
info.folders.restore = publish
main()
"""


@posix_only
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=str)
def test_fault_75_sigterm_ends_a_command_as_ctrl_c_does_and_leaves_nothing(tmp_path, number):
    process = subprocess.Popen(
        [sys.executable, "-c", PUBLISHING, "info", tmp_path / "made"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == b"ready\n"
    assert len(list(tmp_path.iterdir())) == 1
    process.send_signal(number)
    assert process.communicate(timeout=60)[1] == b"interrupted\n"
    assert process.returncode == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["bench", "train"])
def test_fault_what_can_be_gone_on_with_says_so_when_it_is_interrupted(monkeypatch, tmp_path, picture, command):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("defense.benchmarks.datasets.read_tasks", interrupted)
    monkeypatch.setattr("defense.data.sources.open_pictures", interrupted)
    arguments = {"bench": ["mini", "--out", tmp_path / "r"], "train": [picture, "--out", tmp_path / "x", "--block", 1]}
    code, _, err = run(command, *arguments[command])
    assert code == 130
    assert "interrupted; run the same command again to go on" in err


# --- progress ---------------------------------------------------------------------------------------------------------


def test_fault_without_a_terminal_a_stage_is_a_line_and_a_long_one_more(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with progress.stages() as shown:
        for _ in shown.track(range(10), "encoding [x]"):
            now[0] += 20
        shown.start("writing")
        shown.done(1, "ignored until half a minute has passed")
    assert capsys.readouterr().err.splitlines() == [
        "encoding [x]: 10",
        "encoding [x]: 2 of 10, about 3 min left",
        "encoding [x]: 4 of 10, about 2 min left",
        "encoding [x]: 6 of 10, about 80 s left",
        "encoding [x]: 8 of 10, about 40 s left",
        "writing",
    ]


def test_what_takes_no_time_says_nothing(capsys):
    with progress.stages(is_shown=False) as shown:
        assert list(shown.track("ab", "encoding")) == ["a", "b"]
    assert capsys.readouterr().err == ""


def test_on_a_terminal_it_is_a_bar(monkeypatch):
    console = common._Stderr(file=io.StringIO(), force_terminal=True, markup=False, width=200)
    monkeypatch.setattr(progress, "stderr", console)
    with progress.stages() as shown:
        for n in shown.track(range(3), "encoding [/x]"):
            shown.done(n, "loss [0.1]")
    assert "encoding [/x]  loss [0.1]" in console.file.getvalue()


# --- the command itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [[sys.executable, "-m", "defense"], [str(Path(sys.executable).parent / "defense")]])
def test_fault_the_version_is_to_be_had_by_either_name(command):
    from importlib.metadata import version

    done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, version("clip-defense"))


def test_fault_a_quota_bounds_the_threads_of_torch():
    code = """
import sys
from defense import cli
cli.cpu_quota, cli.usable_cores = lambda: 1.5, lambda: 2
cli.app = lambda **_: print(__import__("os").environ["OMP_NUM_THREADS"])
cli.main()
"""
    for given, want in ((None, "2"), ("7", "7")):
        environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
        environment |= {} if given is None else {"OMP_NUM_THREADS": given}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
        assert done.stdout.strip() == want, done.stderr
