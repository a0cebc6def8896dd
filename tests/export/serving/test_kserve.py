"""The real server of KServe's SDK on loopback, by REST and gRPC of its V2 protocol."""

from __future__ import annotations

import base64
import importlib.util
import json
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from typing import Any

import numpy as np
import pytest

if (
    importlib.util.find_spec("kserve") is None
):  # not imported: its protocol's messages and tritonclient's are of one name
    pytest.skip('needs KServe\'s SDK: pip install -e ".[server]"', allow_module_level=True)
pytest.importorskip("tritonclient.grpc")

from safetensors.numpy import load_file, save_file
from tritonclient.utils import InferenceServerException

from defense.export.repository import PICTURES_NAME, VISION_NAME

from ...conftest import restated
from .asking import ATOL, check_graph, infer, named, pictures, texts
from .conftest import jpeg
from .page import block
from .servers import HOST, Server, free_ports, running, status

pytestmark = pytest.mark.server


class KServe(Server):
    """The predictor of a bundle."""

    def __init__(self, bundle, folder, *more: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.http, self.grpc = free_ports(2)
        super().__init__(
            [
                sys.executable, "-P", "-m", "defense.export.kserve", bundle,
                "--http_port", self.http, "--grpc_port", self.grpc, *more,
            ],
            folder / "log",
            f"http://{HOST}:{self.http}/v2/health/ready",
            {},
        )  # fmt: skip


@pytest.fixture(scope="module")
def served(ready, tmp_path_factory):
    server = KServe(ready, tmp_path_factory.mktemp("kserve"), "--watched_share", "1")
    with running(server):
        yield server


def post(server: KServe, model: str, inputs: list[dict[str, Any]]) -> dict[str, Any]:
    """Ask by REST, in plain JSON, and return the outputs by name."""
    request = urllib.request.Request(
        f"http://{HOST}:{server.http}/v2/models/{model}/infer",
        data=json.dumps({"inputs": inputs}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        outputs = json.load(answer)["outputs"]
    return {each["name"]: np.array(each["data"]).reshape(each["shape"]) for each in outputs}


def refused(server: KServe, model: str, inputs: list[dict[str, Any]]) -> str:
    """The message of a request that is the client's fault."""
    with pytest.raises(urllib.error.HTTPError) as error:
        post(server, model, inputs)
    with error.value:
        assert error.value.code in (400, 422)
        return error.value.read().decode()


def tensor(name: str, array: np.ndarray, datatype: str = "FP32") -> dict[str, Any]:
    return {"name": name, "shape": list(array.shape), "datatype": datatype, "data": array.reshape(-1).tolist()}


@pytest.mark.parametrize("by", ["http", "grpc"])
def test_the_graph_answers_as_torch_did(served, golden, clf, by):
    check_graph(served, golden, clf, by)


def urls(files: list[bytes]) -> list[bytes]:
    """Pictures as `data:` URLs: over REST KServe takes for UTF-8 whatever is of the type BYTES."""
    return [b"data:image/png;base64," + base64.b64encode(file) for file in files]


@pytest.mark.parametrize("by", ["http", "grpc"])
def test_pictures_get_torch_s_answers(served, golden, clf, by):
    files, _, embeds = golden
    got = infer(served, PICTURES_NAME, pictures(urls(files) if by == "http" else files), by)
    np.testing.assert_allclose(got["image_embeds"], embeds, atol=ATOL)
    scores = clf.scores(embeds, clf.text_embeds())
    np.testing.assert_allclose(got["scores"], scores, atol=1e-3)
    assert texts(got["label"]) == [clf.classes_[row] for row in scores.argmax(1)]


def test_plain_json_holds_pictures_as_data_urls(served, golden):
    files, pixel_values, embeds = golden
    rows = np.array([[url.decode()] for url in urls(files)])
    got = post(served, PICTURES_NAME, [tensor("picture", rows, "BYTES")])
    np.testing.assert_allclose(got["image_embeds"], embeds, atol=ATOL)
    got = post(served, VISION_NAME, [tensor("pixel_values", pixel_values)])
    np.testing.assert_allclose(got["image_embeds"], embeds, atol=ATOL)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl (apt install curl)")
def test_the_curl_of_the_page_gets_an_answer(served, golden, clf, tmp_path):
    (tmp_path / "photo.jpg").write_bytes(golden[0][0])
    code = block("sh", "clip_defense_pictures").replace("localhost:8080", f"{HOST}:{served.http}")
    done = subprocess.run(["sh", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    outputs = {each["name"]: each["data"] for each in json.loads(done.stdout)["outputs"]}
    assert outputs["label"] == [clf.predict([golden[0][0]])[0]]


def test_each_picture_has_a_strength_of_its_own(served, golden, clf):
    files, pixel_values, _ = golden
    strength = np.linspace(0, 1, len(files), dtype=np.float32)[:, None]
    want, _ = clf.outputs(pixel_values, strength[:, 0])
    for model, inputs in ((VISION_NAME, {"pixel_values": pixel_values}), (PICTURES_NAME, pictures(files))):
        got = infer(served, model, {**inputs, "strength": strength}, "grpc")
        np.testing.assert_allclose(got["image_embeds"], want, atol=ATOL)


def test_labels_of_a_request_hold_for_it_alone(served, golden, clf):
    files, _, embeds = golden
    labels = ["a stone", "a tree", "the sea"]
    got = infer(served, PICTURES_NAME, {**pictures(files), **named(labels, len(files))}, "grpc")
    np.testing.assert_allclose(got["scores"], clf.scores(embeds, clf.label_embeds(labels)[1]), atol=1e-3)
    assert infer(served, PICTURES_NAME, pictures(files), "grpc")["scores"].shape[1] == len(clf.classes_)


def test_a_bad_picture_has_its_own_error_and_the_others_their_answers(served, golden, seven_pictures):
    files, _, embeds = golden
    whole = jpeg(seven_pictures[0])
    got = infer(served, PICTURES_NAME, pictures([files[0], whole[: len(whole) // 2], b"<html>", files[1]]), "grpc")
    assert [error[error.rfind("(") :] for error in texts(got["error"])] == ["", "(truncated)", "(not_an_image)", ""]
    np.testing.assert_allclose(got["image_embeds"][[0, 3]], embeds[:2], atol=ATOL)
    assert np.isnan(got["scores"][[1, 2]]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"datatype": "FP64"}, "pixel_values is FP64; send FP32"),
        ({"name": "pixels"}, "send pixel_values"),
        ({"shape": [1, 3]}, "send [pictures, 3,"),
        ({"data": [1.0]}, "does not hold the data"),
        ({"data": ["a"]}, "does not hold the data"),
    ],
)
def test_tensors_that_cannot_be_are_refused(served, golden, change, message):
    assert message in refused(served, VISION_NAME, [tensor("pixel_values", golden[1][:1]) | change])


@pytest.mark.parametrize("n", [0, 33])
def test_so_many_pictures_are_refused(served, golden, n):
    with pytest.raises(InferenceServerException, match=f"has {n} pictures; send 1 to 32"):
        infer(served, PICTURES_NAME, {"picture": np.full((n, 1), golden[0][0], dtype=object)}, "grpc")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_pixels_that_are_no_numbers_are_refused(served, golden, value):
    with pytest.raises(InferenceServerException, match="pixel_values holds NaN or infinity"):
        infer(served, VISION_NAME, {"pixel_values": np.full_like(golden[1], value)}, "grpc")


def test_a_body_of_100_mb_is_refused_and_the_server_goes_on(served, golden):
    files, _, embeds = golden
    with pytest.raises(InferenceServerException, match="larger than max"):
        infer(served, PICTURES_NAME, pictures([files[0], bytes(100_000_000)]), "grpc")
    got = infer(served, PICTURES_NAME, pictures([*urls(files[:1]), b"data:," + b"0" * 100_000_000]))
    assert texts(got["error"])[1].endswith("(too_large)")
    np.testing.assert_allclose(got["image_embeds"][0], embeds[0], atol=ATOL)


def test_metrics_are_prometheus_text(served, golden):
    def figure(name: str) -> float:
        with urllib.request.urlopen(f"http://{HOST}:{served.http}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        (value,) = [line.split()[-1] for line in lines if line.startswith(f"clip_defense_{name} ")]
        return float(value)

    infer(served, PICTURES_NAME, pictures(golden[0]), "grpc")
    before = {name: figure(name) for name in ("pictures_total", "errors_total", "watched_total")}
    infer(served, PICTURES_NAME, pictures([*golden[0], b""]), "grpc")
    n = len(golden[0])
    assert {name: figure(name) - value for name, value in before.items()} == {
        "pictures_total": n + 1,
        "errors_total": 1,
        "watched_total": n,
    }
    assert figure("removed_energy_total") > 0
    assert figure("golden_difference") <= ATOL


def test_a_killed_server_answers_again(arranged, tmp_path, golden):
    server = KServe(arranged("kserve", text=False), tmp_path / "kserve")
    with running(server):
        with pytest.raises(InferenceServerException, match="this bundle has no text tower"):
            infer(server, PICTURES_NAME, {**pictures(golden[0][:1]), **named(["unknown", "another"], 1)}, "grpc")
        server.kill()
        assert status(server.ready) == 0
        server.start()
        got = infer(server, PICTURES_NAME, pictures(golden[0]), "grpc")
    np.testing.assert_allclose(got["image_embeds"], golden[2], atol=ATOL)


def test_a_bundle_that_does_not_compute_what_was_exported_is_not_served(arranged):
    bundle = arranged("kserve")
    values = load_file(bundle / "golden.safetensors")
    values["image_embeds"] = np.ascontiguousarray(values["image_embeds"][::-1])
    save_file(values, bundle / "golden.safetensors")
    command = [sys.executable, "-P", "-m", "defense.export.kserve", str(restated(bundle))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "error: golden embeddings differ by" in done.stderr
