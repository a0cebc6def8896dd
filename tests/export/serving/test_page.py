"""The page of docs/serve.md: its service for those without a server, and the files that lie beside it."""

from __future__ import annotations

import json
import os
import re
import sys
import urllib.error
import urllib.request
import uuid
from typing import Any

import numpy as np
import pytest

from defense.export import repository
from defense.export.serving.watch import FIGURES

from .conftest import jpeg
from .page import DOCS, block
from .servers import HOST, Server, free_ports, running


def form(**fields: list[bytes]) -> tuple[bytes, str]:
    """A form with files, and its type."""
    boundary = uuid.uuid4().hex
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"'.encode()
        + (b'; filename="a"' if name == "files" else b"")
        + b"\r\n\r\n"
        + value
        + b"\r\n"
        for name, values in fields.items()
        for value in values
    ]
    return b"".join([*parts, f"--{boundary}--\r\n".encode()]), f"multipart/form-data; boundary={boundary}"


@pytest.mark.server
def test_the_service_of_the_page_answers_refuses_and_counts(ready, tmp_path, golden, clf, seven_pictures):
    for package in ("fastapi", "uvicorn", "multipart", "prometheus_client"):
        pytest.importorskip(package, reason='needs what KServe brings: pip install -e ".[server]"')
    (tmp_path / "service.py").write_text(block("python", "FastAPI()"), encoding="utf-8")
    (port,) = free_ports(1)
    server = Server(
        [sys.executable, "-m", "uvicorn", "service:app", "--app-dir", tmp_path, "--host", HOST, "--port", port],
        tmp_path / "log",
        f"http://{HOST}:{port}/ready",
        {"BUNDLE": str(ready), "PYTHONPATH": os.environ.get("PYTHONPATH", "")},
    )

    def ask(**fields: list[bytes]) -> Any:
        body, kind = form(**fields)
        request = urllib.request.Request(f"http://{HOST}:{port}/classify", body, {"Content-Type": kind})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    files, pixel_values, embeds = golden
    whole = jpeg(seven_pictures[0])
    with running(server):
        good, bad = ask(files=[files[0], whole[: len(whole) // 2]])
        scores = clf.scores(embeds[:1], clf.text_embeds())[0]
        assert good["label"] == clf.classes_[scores.argmax()]
        assert good["score"] == pytest.approx(float(scores.max()), abs=1e-4)
        assert bad["error"].endswith("(truncated)")
        (plain,) = ask(files=files[:1], strength=[b"0"])
        undefended, _ = clf.outputs(pixel_values[:1], np.zeros(1, np.float32))
        assert plain["score"] == pytest.approx(float(clf.scores(undefended, clf.text_embeds()).max()), abs=1e-4)
        (other,) = ask(files=files[:1], labels=[b"a stone", b"a tree"])
        assert other["label"] in ("a stone", "a tree")
        for wrong in ({"strength": [b"2"]}, {"labels": [b"a", b"a"]}, {"files": files[:1] * 33}):
            with pytest.raises(urllib.error.HTTPError) as refusal:
                ask(**{"files": files[:1], **wrong})
            with refusal.value:
                assert refusal.value.code == 400
        with urllib.request.urlopen(f"http://{HOST}:{port}/metrics", timeout=5) as answer:
            assert "clip_defense_pictures_total 4.0" in answer.read().decode()


@pytest.mark.parametrize("file", ["dashboard.json", "alerts.yaml", "serve.md"])
def test_what_is_said_of_figures_is_said_of_some_that_there_are(file):
    text = (DOCS / file).read_text(encoding="utf-8")
    named = {name.removesuffix("_total") for name in re.findall(r"clip_defense_[a-z_]+", text)}
    models = {value for name, value in vars(repository).items() if name.endswith("_NAME")}
    assert named
    assert named <= set(FIGURES) | models
    if file == "serve.md":
        assert set(FIGURES) <= named


def test_the_dashboard_and_the_rules_are_what_their_readers_take():
    yaml = pytest.importorskip("yaml")
    dashboard = json.loads((DOCS / "dashboard.json").read_text(encoding="utf-8"))
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids)) >= 4
    assert all(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    rules = yaml.safe_load((DOCS / "alerts.yaml").read_text(encoding="utf-8"))["groups"][0]["rules"]
    for rule in rules:
        assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["expr"].count("(") == rule["expr"].count(")")
