"""`defense export` and `defense info BUNDLE`: outputs and exit codes."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys

import pytest
from PIL import Image

pytest.importorskip("open_clip")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from defense.core.latents import LatentSet
from defense.errors import install_command
from defense.export import bundle, exporter
from defense.export.verify import ParityError
from defense.hosts.attach import attached
from defense.store import defenses

from ..command import run
from ..conftest import random_defense, random_sae


@pytest.fixture
def defense_folder(tmp_path, tiny_clip, tiny_folder):
    site = (1, random_sae(act="relu"), LatentSet("text", tuple(range(60))))
    return defenses.save(random_defense(tiny_clip, site, name=f"local-dir:{tiny_folder}"), tmp_path / "defense")


def test_export_then_info(defense_folder, tmp_path):
    out = tmp_path / "bundle"
    code, printed, told = run("export", out, "--labels", "dog, cat", "--defense", defense_folder, "--mode", "delta")
    assert code == 0
    assert "delta, fp32" in printed
    stages = re.findall(r"^ *\d+ s  (.*)$", told, re.MULTILINE)
    assert [stage.split()[0] for stage in stages] == [
        "loading", "embedding", "tracing", "asking", "comparing", "writing"
    ]  # fmt: skip
    assert "40, batches of 1, 2, 5, 32: max difference to PyTorch" in printed
    manifest = bundle.load(out).manifest_sha256
    assert manifest in printed
    code, printed, _ = run("info", out, "--expect", manifest)
    assert code == 0
    for expected in (
        "2, fixed",
        "relu SAE",
        "text: 60 latents",
        "strength    0 to 1",
        "golden      reproduced on CPUExecutionProvider",
    ):
        assert expected in printed


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


def test_classify_takes_a_bundle(tiny_bundle, picture):
    code, printed, _ = run("classify", picture, "--defense", tiny_bundle, "--top-k", "2")
    assert "defended" in printed
    assert "plain CLIP" not in printed
    assert code == 0
    assert "red.png" in printed
    assert sum(label in printed for label in ("dog", "cat", "red fish")) == 2
    code, printed, _ = run("classify", picture, "--defense", tiny_bundle, "--labels", "stone,tree", "--json")
    assert code == 0
    assert {row["label"] for row in json.loads(printed)["robust"]} == {"stone", "tree"}


def test_strength_switches_the_defense_of_a_bundle_off(tiny_bundle, tiny_classifier, seven_pictures, tmp_path):
    Image.fromarray(seven_pictures[0]).save(tmp_path / "noise.png")
    code, printed, _ = run("classify", tmp_path, "--defense", tiny_bundle, "--json", "--strength", "0")
    assert code == 0
    with attached(tiny_classifier.clip.model).bypassed():
        want = {row["label"]: row["score"] for row in tiny_classifier(seven_pictures[0])}
    got = {row["label"]: row["score"] for row in json.loads(printed)["robust"]}
    assert got == pytest.approx(want, abs=1e-4)
    _, printed, _ = run("classify", tmp_path, "--defense", tiny_bundle, "--json")
    assert {row["label"]: row["score"] for row in json.loads(printed)["robust"]} != pytest.approx(want, abs=1e-4)
    code, _, err = run("classify", tmp_path, "--strength", "0")
    assert code == 2
    assert "--strength is a bundle's" in err


@pytest.mark.parametrize("option", [["--plain"], ["--model", "ViT-B-32"]])
def test_a_bundle_has_no_plain_model_and_no_other_one(tiny_bundle, picture, option):
    code, _, err = run("classify", picture, "--defense", tiny_bundle, *option)
    assert code == 2
    assert "one defended model" in err


def test_fault_52_info_rejects_a_damaged_bundle(copied):
    data = bytearray((copied / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (copied / "model.onnx").write_bytes(data)
    code, printed, err = run("info", copied)
    assert code == 5
    assert "model.onnx: sha256 is" in err
    assert not printed


def test_fault_53_info_notices_an_edited_manifest_when_its_hash_is_pinned(copied):
    pinned = bundle.load(copied).manifest_sha256
    manifest = copied / "manifest.json"
    manifest.write_text(manifest.read_text().replace("red fish", "blue fish"))
    assert run("info", copied)[0] == 0
    code, _, err = run("info", copied, "--expect", pinned)
    assert code == 5
    assert "was changed" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--labels", "dog,dog"], "dog"),
        ([], "--labels"),
        (["--labels", "dog,cat", "--mode", "fast"], "fast"),
        (["--labels", "dog,cat", "--dtype", "fp8"], "fp8"),
    ],
    ids=["duplicate", "no-labels", "mode", "dtype"],
)
def test_usage_errors_exit_with_2(defense_folder, tmp_path, arguments, message):
    code, printed, err = run("export", tmp_path / "bundle", "--defense", defense_folder, *arguments)
    assert code == 2
    assert message in err
    assert not printed
    assert not (tmp_path / "bundle").exists()


def test_a_parity_failure_exits_with_5_and_leaves_nothing(defense_folder, tiny_graphs, tmp_path, monkeypatch):
    def fails(*_arguments):
        raise ParityError(("image_embeds differs by 1",), 1.0, 1e-5, "image_embeds")

    monkeypatch.setattr(exporter, "trace_vision", lambda *_arguments: tiny_graphs["trace_vision"])
    monkeypatch.setattr(exporter, "verify", fails)
    code, _, err = run("export", tmp_path / "bundle", "--labels", "dog,cat", "--defense", defense_folder)
    assert code == 5
    assert "image_embeds differs by 1" in err
    assert {path.name for path in tmp_path.iterdir()} == {"defense"}


TERMINATED = """
import sys, time
from defense.export import exporter
def verify(*_):
    print("verifying", flush=True)
    time.sleep(60)
exporter.verify = verify
exporter.trace_vision = exporter.write = lambda *_: None
from defense.cli import main
sys.argv = ["defense", *sys.argv[1:]]
main()
"""


def test_fault_75_sigterm_ends_an_export_as_ctrl_c_does(defense_folder, tmp_path):
    command = [sys.executable, "-P", "-c", TERMINATED, "export", tmp_path / "bundle", "--labels", "dog,cat"]
    with subprocess.Popen(
        [*command, "--defense", defense_folder], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "verifying\n"
        assert len(list(tmp_path.iterdir())) == 2
        process.terminate()
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in err
    assert [path.name for path in tmp_path.iterdir()] == ["defense"]


def without(modules: list[str], *arguments: object) -> subprocess.CompletedProcess:
    script = (
        "import json, sys\nfor name in json.loads(sys.argv[1]): sys.modules[name] = None\n"
        "from defense.cli import main; sys.argv = ['defense', *sys.argv[2:]]; main()"
    )
    command = [sys.executable, "-P", "-c", script, json.dumps(modules), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_fault_70_without_the_exporter_the_answer_is_the_command_that_installs_it(tmp_path):
    for missing in ["onnxscript"], ["torch", "open_clip"]:
        done = without(missing, "export", tmp_path / "bundle")
        assert done.returncode == 3
        assert install_command("export") in done.stderr.replace("\n", "")
        assert "Traceback" not in done.stderr


def test_fault_70_info_checks_a_bundle_without_torch_and_says_so_without_a_runtime(tiny_bundle):
    done = without(["torch", "open_clip", "onnx", "onnxscript"], "info", tiny_bundle)
    assert done.returncode == 0, done.stderr
    assert "golden      reproduced" in done.stdout
    done = without(["torch", "onnxruntime"], "info", tiny_bundle)
    assert done.returncode == 0, done.stderr
    assert "golden" not in done.stdout
    assert install_command("onnx") in done.stderr.replace("\n", "")
    done = without(["torch", "onnxruntime"], "info", tiny_bundle, "--check")
    assert done.returncode == 3
    assert install_command("onnx") in done.stderr.replace("\n", "")


def test_info_check_of_a_bundle_is_its_golden_embeddings_and_needs_no_host(tiny_bundle):
    code, printed, _ = run("info", tiny_bundle, "--check")
    assert code == 0
    assert "golden      reproduced" in printed
    code, printed, err = run("info", tiny_bundle, "--check", "--model", "ViT-B-32")
    assert code == 2
    assert "are for a defense" in err
    assert not printed


def test_fault_69_doctor_names_two_wheels_of_one_module(monkeypatch):
    from defense.export import sessions

    monkeypatch.setattr(sessions, "installed_wheels", lambda: ["onnxruntime", "onnxruntime-gpu"])
    code, printed, err = run("doctor")
    assert code == 3
    assert "overwrite each other" in err
    assert "onnxruntime-gpu" in printed


@pytest.mark.parametrize(("module", "package"), [("kserve", "kserve"), ("ray_data", "ray")])
def test_fault_70_a_program_says_in_a_line_which_package_it_lacks(tiny_bundle, tmp_path, module, package):
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed here; the environment of the fast tests lacks it")
    (tmp_path / "in").mkdir()
    arguments = [tiny_bundle] if module == "kserve" else [tmp_path / "in", tmp_path / "out", "--bundle", tiny_bundle]
    command = [sys.executable, "-P", "-m", f"defense.export.{module}", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr.startswith("error: ")
    assert f"[{package}]" in done.stderr
    assert "Traceback" not in done.stderr
