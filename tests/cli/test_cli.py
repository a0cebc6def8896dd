"""The command line: outputs and exit codes, run in this process."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import typer
from PIL import Image

pytest.importorskip("open_clip")

from defense.cli import app
from defense.data.labels import common_nouns
from defense.embedded.photo.names import load_words
from defense.errors import install_command
from defense.hosts.shipped import DEFAULT, MODELS
from defense.store import folders
from defense.world.scenes import OBJECTS

from ..command import run


@pytest.fixture
def pictures(tmp_path):
    """A folder with two pictures, one in a subfolder with a space, and files that are no pictures."""
    folder = tmp_path / "pictures"
    (folder / "more pictures").mkdir(parents=True)
    for seed, name in enumerate(["b.png", "more pictures/a.jpg"]):
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "notes.txt").write_text("not a picture")
    return folder


def test_a_folder_is_classified_side_by_side(defense_folder, pictures):
    code, out, _ = run("classify", pictures, "--labels", "dog, cat", "--defense", defense_folder)
    assert code == 0
    for expected in ("b.png", "a.jpg", "plain CLIP", "defended", "dog", "cat", "removed: text"):
        assert expected in out
    assert "notes.txt" not in out


def test_json_is_one_object_a_line_and_nothing_else(defense_folder, pictures):
    code, out, _ = run("classify", pictures, "--labels", "dog,cat", "--defense", defense_folder, "--json")
    assert code == 0
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["file"] for row in rows] == [str(pictures / "b.png"), str(pictures / "more pictures" / "a.jpg")]
    for row in rows:
        assert {p["label"] for p in row["plain"]} == {p["label"] for p in row["robust"]} == {"dog", "cat"}
        assert row["removed"][0]["set_name"] == "text"
        assert row["changed"] == (row["plain"][0]["label"] != row["robust"][0]["label"])


def test_plain_prints_stock_clip_only(defense_folder, pictures):
    code, out, _ = run("classify", pictures / "b.png", "--labels", "dog,cat", "--defense", defense_folder, "--plain")
    assert code == 0
    assert "defended" not in out
    assert "removed" not in out
    code, out, _ = run(
        "classify", pictures / "b.png", "--labels", "dog,cat", "--defense", defense_folder, "--plain", "--json"
    )
    assert set(json.loads(out)) == {"file", "plain", "warnings"}


def test_labels_can_come_from_a_file(defense_folder, pictures, tmp_path):
    (tmp_path / "labels.txt").write_text("dog\ncat\nred fish\n")
    arguments = ("classify", pictures / "b.png", "--defense", defense_folder, "--json")
    code, out, _ = run(*arguments, "--labels-file", tmp_path / "labels.txt")
    assert code == 0
    assert {p["label"] for p in json.loads(out)["plain"]} == {"dog", "cat", "red fish"}
    code, _, err = run(*arguments, "--labels-file", tmp_path / "labels.txt", "--labels", "dog")
    assert code == 2
    assert "not both" in err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(None, "cannot be read (No such file", id="missing"),
        pytest.param("folder", "cannot be read (Is a directory)", id="folder"),
        pytest.param(b"\n \n", "holds no label; write at least two into it, one a line", id="empty"),
        pytest.param(bytes(range(256)), "is not UTF-8 text", id="binary"),
        pytest.param(bytes(64), "control character U+0000", id="zeros"),
    ],
)
def test_a_labels_file_that_is_none_is_a_usage_error(defense_folder, pictures, tmp_path, content, message):
    path = tmp_path / "labels.txt"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    code, out, err = run("classify", pictures / "b.png", "--defense", defense_folder, "--labels-file", path)
    assert (code, out) == (2, "")
    assert f"error: {path}" in err
    assert message in err
    assert "Errno" not in err


def test_bad_pictures_are_named_and_the_rest_goes_on(defense_folder, pictures):
    (pictures / "c.png").write_bytes(b"<html>not found</html>")
    arguments = ("classify", pictures, "--labels", "dog,cat", "--defense", defense_folder, "--json")
    code, out, err = run(*arguments)
    assert code == 4
    assert len(out.splitlines()) == 2
    assert "c.png" in err
    assert "not_an_image" in err
    assert "1 of 3" in err
    code, out, _ = run(*arguments, "--on-error", "return")
    assert code == 4
    assert json.loads(out.splitlines()[1])["error"]["code"] == "not_an_image"
    code, out, err = run(*arguments, "--on-error", "raise")
    assert code == 4
    assert len(out.splitlines()) == 1
    assert "not_an_image" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--labels", "dog,dog"], "dog"),
        (["--labels", "dog,,cat"], '--labels "dog,,cat": name 2 of 3 is blank: a comma too many'),
        (["--labels", ""], '--labels "": there is no name'),
        (["--labels", "dog", "--template", "no braces"], "{}"),
        (["--labels", "dog", "--top-k", "0"], "top-k"),
        (["--labels", "dog", "--model", "ViT-Z-99"], "ViT-Z-99"),
    ],
    ids=["duplicate", "blank", "none", "template", "top-k", "model"],
)
def test_usage_errors_exit_with_2(defense_folder, pictures, arguments, message):
    code, out, err = run("classify", pictures, "--defense", defense_folder, *arguments)
    assert code == 2
    assert message in err
    assert not out


def test_without_labels_a_model_of_ones_own_chooses_among_common_nouns(defense_folder, pictures, tmp_path):
    code, out, err = run("classify", pictures, "--defense", defense_folder, "--json", "--top-k", 1000)
    assert code == 0
    said = [json.loads(line)["robust"] for line in out.splitlines()]
    assert {entry["label"] for entry in said[0]} == set(common_nouns())
    assert f"labels: {len(common_nouns())} common nouns" in err
    code, out, err = run("export", tmp_path / "bundle", "--defense", defense_folder)
    assert (code, out) == (2, ""), "labels that nobody chose are not baked into a graph"
    assert "--labels or --labels-file is missing" in err
    for name in ("embedded", "photo"):
        code, out, err = run("classify", pictures, "--defense", name, "--json", "--top-k", 1000)
        own = OBJECTS if name == "embedded" else load_words().names
        assert {entry["label"] for entry in json.loads(out.splitlines()[0])["robust"]} == set(own)
        assert "labels" not in err, "a model that ships has labels of its own"


OF_ANOTHER_MODEL = {
    "bench": ["mini", "--defense", "embedded:waterbirds"],
    "classify": ["--labels", "dog,cat"],
    "classify without labels": [],
    "demo": [],
    "explain": ["PICTURE", "--out", "b.html"],
    "export": ["OUT", "--labels", "dog,cat"],
    "info": ["--check"],
}


@pytest.mark.parametrize("command", OF_ANOTHER_MODEL)
@pytest.mark.parametrize("pretrained", ["openai", "weights.pt"])
def test_a_shipped_defense_goes_into_no_other_model(command, pretrained, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [str(pictures / "b.png") if each == "PICTURE" else each for each in OF_ANOTHER_MODEL[command]]
    code, out, err = run(command.split()[0], *arguments, "--model", "ViT-B-32", "--pretrained", pretrained)
    assert code == 2
    name, knows = ("embedded", "a hundred drawn things") if command == "bench" else ("photo", "a thousand names of ")
    assert err.startswith(f"error: the {name} defense fits the {name} model alone, which knows {knows}")
    assert err.endswith(f"; one for this model comes from: defense protect ViT-B-32 --pretrained {pretrained}\n")
    assert err.count("\n") == 1
    assert not out or command == "info", "nothing is classified on the way"
    assert {path.name for path in tmp_path.iterdir()} == {"pictures"}


def test_a_shipped_defense_is_known_by_its_models_weights(tiny_folder, pictures):
    """A folder may hold the model itself; this one does not."""
    code, out, err = run("classify", pictures, "--labels", "a,b", "--model", f"local-dir:{tiny_folder}")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "defense protect MODEL" in err
    folder = MODELS[DEFAULT].folder("clip")
    code, _, _ = run("classify", pictures, "--labels", "a,b", "--model", f"local-dir:{folder}")
    assert code == 0


CHOICES = [
    ("classify", "--on-error", ("raise", "skip", "return")),
    ("explain", "--edit", ("scale", "project")),
    ("export", "--mode", ("exact", "static", "delta")),
    ("export", "--dtype", ("fp32", "fp16", "int8")),
    ("export", "--layout", ("bundle", "triton", "kserve")),
    ("fit", "--task", ("text", "group")),
    ("fit", "--edit", ("scale", "project")),
    ("fit", "--scope", ("cls", "patch", "all")),
    ("train", "--variant", ("topk", "batchtopk", "matryoshka", "relu")),
    ("train", "--tokens", ("cls", "patch", "all")),
]


@pytest.mark.parametrize(("command", "option", "values"), CHOICES, ids=lambda value: str(value).lstrip("-"))
def test_an_option_with_choices_takes_these_and_no_other(command, option, values):
    code, out, err = run(command, option, "set")
    assert (code, out) == (2, "")
    message = " ".join(err.replace("│", " ").split())
    _, _, choices = message.partition("'set' is not one of")
    assert f"Invalid value for '{option}'" in message
    assert set(re.findall(r"'(\w+)'", choices)) == set(values)


REQUIRED = {
    "bench": ["mini"],
    "classify": [],
    "demo": [],
    "describe": ["SAE", "--pictures", "PICTURES", "--words", "words.txt", "--out", "OUT"],
    "explain": ["b.png", "--out", "b.html"],
    "export": ["OUT"],
    "fit": ["OUT", "PICTURES", "--sae", "SAE"],
    "info": [],
    "train": ["PICTURES", "--out", "OUT", "--block", "1"],
}


@pytest.mark.parametrize("command", REQUIRED)
def test_weights_of_no_model_are_refused_before_anything_is_read(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    code, out, err = run(command, *REQUIRED[command], "--pretrained", "openai")
    assert (code, out) == (2, "")
    assert "--pretrained openai says which weights a --model has, and there is none" in err
    assert not list(tmp_path.iterdir())


def test_every_command_that_takes_weights_is_among_those():
    takes = {
        name
        for name, command in typer.main.get_command(app).commands.items()
        if "pretrained" in {parameter.name for parameter in command.params}
    }
    assert takes == {*REQUIRED, "protect"}  # whose model is an argument: see tests/protect


def test_an_import_is_refused_before_anything_is_read_where_it_could_not_be_written(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    code, out, err = run("import", tmp_path / "nowhere.pt", tmp_path)
    assert (code, out) == (2, "")
    assert "is no SAE" in err


def test_a_label_that_is_no_class_is_refused_before_the_training(tiny_folder, pictures, tmp_path, monkeypatch):
    from defense.hosts import clip

    monkeypatch.setattr(clip, "load_clip", lambda *_, **__: pytest.fail("the CLIP was loaded"))
    (tmp_path / "ants").mkdir()
    (pictures / "more pictures").rename(tmp_path / "ants" / "ant")
    (tmp_path / "names.txt").write_text("cow\ndog\n")
    arguments = (tmp_path / "ants", "--out", tmp_path / "sae", "--block", 1, "--labels-file", tmp_path / "names.txt")
    code, out, err = run("train", *arguments, "--model", f"local-dir:{tiny_folder}")
    assert (code, out) == (2, "")
    assert "has the label 'ant', which is none of the 2 class names" in err


def test_an_empty_folder_is_a_usage_error(defense_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    code, _, err = run("classify", tmp_path / "empty", "--labels", "dog", "--defense", defense_folder)
    assert code == 2
    assert "no pictures" in err


def test_fault_32_a_picture_that_is_not_there_fails_alone(defense_folder, pictures, tmp_path):
    code, out, err = run(
        "classify",
        tmp_path / "nowhere.png",
        pictures / "b.png",
        "--labels",
        "dog,cat",
        "--defense",
        defense_folder,
        "--json",
    )
    assert code == 4
    assert len(out.splitlines()) == 1
    assert err.replace("\n", "").count("nowhere.png") == 1


def test_fault_52_a_damaged_defense_exits_with_5(defense_folder, pictures):
    weights = defense_folder / "site-0.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    code, out, err = run("classify", pictures, "--labels", "dog,cat", "--defense", defense_folder)
    assert code == 5
    assert "sha256" in err
    assert not out
    assert run("info", defense_folder)[0] == 5


def test_fault_53_an_edited_manifest_is_noticed_when_its_hash_is_pinned(defense_folder):
    pinned = folders.sha256_of(defense_folder / "manifest.json")
    code, out, _ = run("info", defense_folder, "--expect", pinned)
    assert code == 0
    assert "60 latents" in out
    assert pinned in out.replace("\n", "")
    manifest = defense_folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"all"', '"cls"'))
    code, _, err = run("info", defense_folder, "--expect", pinned)
    assert code == 5
    assert "was changed" in err


def test_fault_70_without_torch_the_answer_is_the_command_that_installs_it(tmp_path):
    script = (
        "import sys; sys.modules['torch'] = None; sys.modules['open_clip'] = None\n"
        "from defense.cli import main; sys.argv = ['defense', *sys.argv[1:]]; main()"
    )

    def without_torch(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)

    result = without_torch("classify")
    assert result.returncode == 3
    assert install_command("torch") in result.stderr.replace("\n", "")
    assert "Traceback" not in result.stderr
    for command in (["--help"], ["info"], ["doctor"], ["--version"]):
        result = without_torch(*command)
        assert result.returncode == 0, result.stderr
        assert result.stdout


def test_doctor_lists_the_packages():
    code, out, _ = run("doctor")
    assert code == 0
    assert "torch" in out
    assert "clip-defense" in out


def test_fault_75_an_interrupt_exits_with_130(defense_folder, pictures, monkeypatch):
    from defense.classify.classifier import RobustClassifier

    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(RobustClassifier, "explain", interrupted)
    code, _, err = run("classify", pictures, "--labels", "dog,cat", "--defense", defense_folder)
    assert code == 130
    assert "interrupted" in err


def test_fault_103_what_was_passed_over_is_said_by_reason(defense_folder, pictures):
    (pictures / "._b.png").write_bytes(b"")
    (pictures / "scan").write_bytes((pictures / "b.png").read_bytes())
    code, out, err = run("classify", pictures, "--labels", "dog,cat", "--defense", defense_folder, "--json")
    assert code == 0
    files = [json.loads(line)["file"] for line in out.splitlines()]
    assert files == [str(pictures / name) for name in ("b.png", "more pictures/a.jpg", "scan")]
    assert "passed over: 1 hidden, 1 no picture by its name" in err


def test_tars_and_tables_are_classified_like_the_files_in_them(defense_folder, pictures, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    options = ("--labels", "dog,cat", "--defense", defense_folder, "--json")
    data = (pictures / "b.png").read_bytes()
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(pictures / "b.png", "b.png")
    cells = [{"bytes": data, "path": None}, {"bytes": None, "path": "pictures/b.png"}, None]
    parquet.write_table(pyarrow.table({"image": cells}), tmp_path / "y.parquet")
    (want,) = (json.loads(line) for line in run("classify", pictures / "b.png", *options)[1].splitlines())
    code, out, err = run("classify", tmp_path / "x.tar", tmp_path / "y.parquet", *options)
    assert code == 4
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["robust"] for row in rows] == [want["robust"]] * 3
    assert [row["file"] for row in rows][:2] == [f"{tmp_path}/x.tar:b.png", f"{tmp_path}/y.parquet#0"]
    assert f"{tmp_path}/y.parquet#2: the cell holds no picture" in err
    assert "1 of 4 pictures could not be read" in err


def test_notes_on_a_picture_reach_the_reader(defense_folder, tmp_path):
    Image.new("RGBA", (40, 40), (0, 0, 0, 0)).save(tmp_path / "a.png")
    options = ("--labels", "dog,cat", "--defense", defense_folder)
    for more in ((), ("--plain",)):
        code, _, err = run("classify", tmp_path / "a.png", *options, *more)
        assert code == 0
        assert "note: nothing in it can be seen" in err
        _, out, _ = run("classify", tmp_path / "a.png", *options, *more, "--json")
        assert json.loads(out)["warnings"] == ["invisible"]


@pytest.mark.parametrize("plain", [(), ("--plain",)])
def test_the_largest_picture_that_is_read_is_an_option(defense_folder, pictures, plain):
    command = ("classify", pictures / "b.png", "--labels", "dog,cat", "--defense", defense_folder, *plain)
    code, _, err = run(*command, "--max-pixels", 1599)
    assert code == 4
    assert "40 x 40 pixels, more than 1599" in err
    assert "--max-pixels" in err
    assert run(*command, "--max-pixels", 1600)[0] == 0


def test_an_empty_folder_is_refused_before_a_model_is_loaded(defense_folder, tmp_path, monkeypatch):
    from defense.classify.classifier import RobustClassifier

    monkeypatch.setattr(RobustClassifier, "from_pretrained", None)
    (tmp_path / "none").mkdir()
    code, _, err = run("classify", tmp_path / "none", "--labels", "dog,cat", "--defense", defense_folder)
    assert code == 2
    assert "holds no pictures" in err


@pytest.mark.parametrize("name", sorted(typer.main.get_command(app).commands))
def test_the_help_of_each_option_stands_alone(name):
    command = typer.main.get_command(app).commands[name]
    helps = {parameter.name: parameter.help for parameter in command.params if parameter.name != "help"}
    points_elsewhere = re.compile(r"(The same|Its|Of|In place of)\b")
    assert all(helps.values()), helps
    assert not [key for key, text in helps.items() if points_elsewhere.match(text)]


def test_the_help_of_bench_names_every_suite_and_data_set():
    from defense.benchmarks.datasets import READERS, SUITES

    (suite,) = (each for each in typer.main.get_command(app).commands["bench"].params if each.name == "suite")
    named = set(re.findall(r"[a-z0-9-]+", suite.help))
    assert {*READERS, *SUITES, "speed", "latents"} <= named
