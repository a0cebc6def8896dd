"""What the Dockerfiles say, and what their steps do in a clean environment, since no Docker engine may be there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from defense.export import layouts

NOBODY = 65534
IMAGES = {"bundle": layouts._COMMAND, "kserve": layouts._PREDICTOR}


def steps(text: str) -> dict[str, str]:
    """The instructions of a Dockerfile; each is there once."""
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
    pairs = [line.split(" ", 1) for line in lines]
    assert len(dict(pairs)) == len(pairs)
    return {name: " ".join(rest.split()) for name, rest in pairs}


@pytest.mark.parametrize("layout", IMAGES)
def test_an_image_runs_as_nobody_read_only_with_a_health_check_and_torch_is_not_in_it(layout):
    text = layouts._dockerfile(IMAGES[layout])
    said = steps(text)
    assert said["USER"] == f"{NOBODY}:{NOBODY}"
    assert json.loads(said["HEALTHCHECK"].partition("CMD ")[2])
    assert json.loads(said["ENTRYPOINT"])[-1] == "/bundle"
    assert said["RUN"].endswith("rm -rf /bundle/wheels && defense info /bundle")
    assert "ORT_DISABLE_TELEMETRY=1" in said["ENV"]
    assert "ADD" not in said
    assert "torch]" not in text
    (run,) = [line for line in text.splitlines() if "docker run" in line]
    assert "--read-only --tmpfs /tmp" in run
    assert "docker build --network none" in text
    assert "pip install --no-cache-dir --no-index --find-links=/bundle/wheels " in said["RUN"]


@pytest.fixture
def image() -> Iterator[Path]:
    """A folder that stands for an image: whoever is nobody can read it, and run the Python that its own is made of."""
    if os.geteuid() == 0:
        try:
            subprocess.run([Path(sys.executable).resolve(), "--version"], user=NOBODY, check=True, capture_output=True)
        except PermissionError:
            pytest.skip(f"only root may run the Python in {sys.base_prefix}; run this by one that everybody may run")
    folder = Path(tempfile.mkdtemp(prefix="clip-defense-image-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.server
def test_the_steps_of_the_command_s_image_work_in_a_clean_environment_and_without_a_network(
    ready, image, golden, wheels
):
    bundle = Path(shutil.copytree(ready, image / "bundle"))
    (bundle / "Dockerfile").write_text(layouts._dockerfile(layouts._COMMAND), encoding="utf-8")
    from ...conftest import restated

    restated(bundle)
    shutil.copytree(wheels, bundle / "wheels")
    subprocess.run([sys.executable, "-m", "venv", str(image / "venv")], check=True)
    said = steps((bundle / "Dockerfile").read_text(encoding="utf-8"))
    (image / "tmp").mkdir()
    (image / "tmp").chmod(0o777)
    environment = dict(pair.split("=") for pair in said["ENV"].split())
    environment |= {
        "PATH": f"{image / 'venv' / 'bin'}:/usr/bin:/bin",
        "HOME": str(image / "tmp"),
        "TMPDIR": str(image / "tmp"),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "LC_ALL": "C.UTF-8",
    }

    def run(command: list[str], *, is_nobody: bool) -> subprocess.CompletedProcess[str]:
        ids = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if is_nobody and os.geteuid() == 0 else {}
        return subprocess.run(
            [part.replace("/bundle", str(bundle)) for part in command],
            env=environment, cwd="/", capture_output=True, text=True, check=False, timeout=300, **ids,
        )  # fmt: skip

    built = run(["sh", "-c", said["RUN"]], is_nobody=False)
    assert built.returncode == 0, built.stdout + built.stderr
    assert re.search(r"^golden +reproduced", built.stdout, re.MULTILINE)
    assert not (bundle / "wheels").exists()

    (image / "pictures").mkdir()
    (image / "pictures" / "a.png").write_bytes(golden[0][0])
    for path in (*bundle.rglob("*"), bundle):  # read-only
        path.chmod(path.stat().st_mode & ~0o222 | 0o444 | (0o111 if path.is_dir() else 0))
    before = sorted(bundle.rglob("*"))
    answered = run([*json.loads(said["ENTRYPOINT"]), str(image / "pictures"), "--json"], is_nobody=True)
    assert answered.returncode == 0, answered.stderr
    assert json.loads(answered.stdout.splitlines()[0])["robust"]
    healthy = run(json.loads(said["HEALTHCHECK"].partition("CMD ")[2]), is_nobody=True)
    assert healthy.returncode == 0, healthy.stderr
    assert sorted(bundle.rglob("*")) == before
    for path in (*bundle.rglob("*"), bundle):
        path.chmod(path.stat().st_mode | 0o700)
