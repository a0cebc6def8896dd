"""The real Triton on loopback, with the models that a bundle holds for it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tritonclient.grpc")
pytest.importorskip("geventhttpclient", reason="tritonclient.http needs it")
pytest.importorskip("tritonclient.http")

import tritonclient.http as http
from safetensors.numpy import load_file, save_file
from tritonclient.utils import InferenceServerException

from defense.export import readme
from defense.export.repository import PICTURE_REPOSITORY, PICTURES_NAME, RAW_NAME, REPOSITORY, VISION_NAME

from ...conftest import restated
from .asking import ATOL, check_graph, infer, named, pictures, texts
from .conftest import jpeg
from .installed import environment, site_packages
from .page import block
from .servers import HOST, Triton, running, status
from .stand_in import run_in_python

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def triton(arranged, python, tmp_path_factory):
    bundle = arranged("triton-python")
    server = Triton([bundle / REPOSITORY, bundle / PICTURE_REPOSITORY], tmp_path_factory.mktemp("triton"), python)
    with running(server):
        yield server


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["http", "grpc"])
def test_the_graph_answers_as_torch_did(triton, golden, clf, by):
    check_graph(triton, golden, clf, by)


@pytest.mark.parametrize("by", ["http", "grpc"])
def test_pictures_get_torch_s_answers(triton, golden, clf, by):
    files, _, embeds = golden
    got = infer(triton, PICTURES_NAME, pictures(files), by)
    np.testing.assert_allclose(got["image_embeds"], embeds, atol=ATOL)
    scores = clf.scores(embeds, clf.text_embeds())
    np.testing.assert_allclose(got["scores"], scores, atol=1e-3)
    np.testing.assert_array_equal(got["score"][:, 0], got["scores"].max(1))
    assert texts(got["label"]) == [clf.classes_[row] for row in scores.argmax(1)]
    assert texts(got["error"]) == [""] * len(files)


def test_a_file_is_the_body_of_a_request(triton, golden):
    files, _, embeds = golden
    request = urllib.request.Request(
        f"http://{HOST}:{triton.http}/v2/models/{RAW_NAME}/infer",
        data=files[0],
        headers={"Inference-Header-Content-Length": "0", "Content-Type": "application/octet-stream"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        size = int(answer.headers["Inference-Header-Content-Length"])
        body = answer.read()
    outputs, start = {}, size
    for output in json.loads(body[:size])["outputs"]:
        n_bytes = output["parameters"]["binary_data_size"]
        outputs[output["name"]] = body[start : start + n_bytes]
        start += n_bytes
    np.testing.assert_allclose(np.frombuffer(outputs["image_embeds"], np.float32), embeds[0], atol=ATOL)


def test_each_picture_has_a_strength_of_its_own(triton, golden, clf):
    files, pixel_values, _ = golden
    strength = np.linspace(0, 1, len(files), dtype=np.float32)[:, None]
    want, _ = clf.outputs(pixel_values, strength[:, 0])
    assert np.abs(want[0] - golden[2][0]).max() > 10 * ATOL
    for model, inputs in ((VISION_NAME, {"pixel_values": pixel_values}), (PICTURES_NAME, pictures(files))):
        got = infer(triton, model, {**inputs, "strength": strength})
        np.testing.assert_allclose(got["image_embeds"], want, atol=ATOL)


def test_requests_of_many_clients_are_answered_each_with_its_own(triton, golden):
    files, _, embeds = golden

    def ask(row: int) -> np.ndarray:
        return infer(triton, PICTURES_NAME, pictures([files[row]]))["image_embeds"][0]

    rows = [row % len(files) for row in range(24)]
    with ThreadPoolExecutor(8) as pool:
        np.testing.assert_allclose(list(pool.map(ask, rows)), embeds[rows], atol=ATOL)


def test_the_clients_of_the_page_and_of_a_bundle_s_readme_get_answers(triton, arranged, golden, clf, tmp_path):
    files = golden[0]
    for name in ("a.jpg", "b.jpg", "photo.jpg", "picture.jpg"):
        (tmp_path / name).write_bytes(files[0])
    bundle = arranged("triton-python")
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    (of_readme,) = re.findall(r"```py\n(.*?)```", readme.render(manifest, "triton-python", bundle), re.DOTALL)
    label = str(clf.predict([files[0]])[0])
    for code in (block("py", "clip_defense_pictures"), of_readme.replace('load(".")', f"load({str(bundle)!r})")):
        code = code.replace("localhost:8000", f"{HOST}:{triton.http}")
        done = subprocess.run(
            [sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert label in done.stdout, done.stderr


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl (apt install curl)")
def test_the_curl_of_the_page_gets_an_answer(triton, golden, clf, tmp_path):
    (tmp_path / "photo.jpg").write_bytes(golden[0][0])
    code = block("sh", "clip_defense_raw").replace("localhost:8000", f"{HOST}:{triton.http}")
    done = subprocess.run(["sh", "-c", code], cwd=tmp_path, capture_output=True, check=True)
    assert str(clf.predict([golden[0][0]])[0]).encode() in done.stdout


# --- Triton's own backend for graphs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_onnx(arranged, python, tmp_path_factory):
    """A server of the layout whose graphs are Triton's to run."""
    bundle = arranged("triton")
    assert len(run_in_python(bundle / REPOSITORY)) == 3
    folder = tmp_path_factory.mktemp("onnx")
    with running(Triton([bundle / REPOSITORY, bundle / PICTURE_REPOSITORY], folder, python)) as server:
        yield server


@pytest.mark.parametrize("by", ["http", "grpc"])
def test_a_graph_that_triton_runs_needs_no_strength_and_takes_one(of_onnx, golden, clf, by):
    check_graph(of_onnx, golden, clf, by)
    files, pixel_values, _ = golden
    strength = np.linspace(0, 1, len(files), dtype=np.float32)[:, None]
    want, _ = clf.outputs(pixel_values, strength[:, 0])
    for model, inputs in ((VISION_NAME, {"pixel_values": pixel_values}), (PICTURES_NAME, pictures(files))):
        got = infer(of_onnx, model, {**inputs, "strength": strength}, by)
        np.testing.assert_allclose(got["image_embeds"], want, atol=ATOL)


def test_a_strength_for_fewer_pictures_and_33_pictures_are_refused_before_a_graph_runs(of_onnx, golden):
    pixel_values = golden[1]
    for wrong in (
        {"pixel_values": pixel_values[:3], "strength": np.ones((2, 1), np.float32)},
        {"pixel_values": np.repeat(pixel_values[:1], 33, axis=0)},
    ):
        with pytest.raises(InferenceServerException, match="batch"):
            infer(of_onnx, VISION_NAME, wrong)


def test_requests_without_a_strength_and_with_one_are_answered_each_with_its_own(of_onnx, golden, clf):
    _, pixel_values, embeds = golden
    plain, _ = clf.outputs(pixel_values, np.zeros(len(pixel_values), np.float32))

    def ask(number: int) -> np.ndarray:
        strength = {"strength": np.zeros((1, 1), np.float32)} if number % 2 else {}
        row = number % len(embeds)
        return infer(of_onnx, VISION_NAME, {"pixel_values": pixel_values[row : row + 1], **strength})["image_embeds"][0]

    numbers = range(24)
    want = [(plain if number % 2 else embeds)[number % len(embeds)] for number in numbers]
    with ThreadPoolExecutor(8) as pool:
        np.testing.assert_allclose(list(pool.map(ask, numbers)), want, atol=ATOL)


def test_classes_are_named_by_the_labels_of_the_graph(of_onnx, triton, golden, clf):
    want = clf.predict([golden[0][0]])[0]
    pixels = http.InferInput("pixel_values", [1, *golden[1].shape[1:]], "FP32")
    pixels.set_data_from_numpy(golden[1][:1])
    best = http.InferRequestedOutput("logits_per_image", class_count=1)
    for server in (of_onnx, triton):
        with http.InferenceServerClient(f"{HOST}:{server.http}") as client:
            answer = client.infer(VISION_NAME, [pixels], outputs=[best])
        assert answer.as_numpy("logits_per_image")[0, 0].decode().split(":")[2] == want


# --- labels of a request ----------------------------------------------------------------------------------------------


def test_labels_of_a_request_go_through_the_text_tower_and_hold_for_it_alone(triton, golden, clf):
    files, _, embeds = golden
    labels = ["a stone", "a tree", "the sea", "Käse"]
    got = infer(triton, PICTURES_NAME, {**pictures(files), **named(labels, len(files))})
    names, text_embeds = clf.label_embeds(labels)
    want = clf.scores(embeds, text_embeds)
    np.testing.assert_allclose(got["scores"], want, atol=1e-3)
    assert texts(got["label"]) == [names[row] for row in want.argmax(1)]
    assert infer(triton, PICTURES_NAME, pictures(files))["scores"].shape[1] == len(clf.classes_)


def test_embeddings_of_labels_are_taken_as_they_are(triton, golden, clf):
    files, _, embeds = golden
    text_embeds = 3 * np.stack([embeds[0], -embeds[0]])
    inputs = {**pictures(files[:1]), **named(["this", "not this"], 1), "text_embeds": text_embeds[None]}
    got = infer(triton, PICTURES_NAME, inputs)
    assert texts(got["label"]) == ["this"]
    np.testing.assert_allclose(got["scores"], clf.scores(embeds[:1], text_embeds / 3), atol=1e-3)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([str(i) for i in range(1001)], "1001 labels; send at most 1000"),
        (["x" * 501, "y"], "a label has 501 characters"),
        (["dog", "dog"], "repeats"),
        (["dog\nrm", "cat"], "labels"),
    ],
)
def test_labels_that_cannot_be_are_refused(triton, golden, labels, message):
    with pytest.raises(InferenceServerException, match=message):
        infer(triton, PICTURES_NAME, {**pictures(golden[0][:1]), **named(labels, 1)})


def test_labels_that_differ_between_the_pictures_of_a_request_are_refused(triton, golden):
    labels = {"labels": np.array([[b"a", b"b"], [b"a", b"c"]], dtype=object)}
    with pytest.raises(InferenceServerException, match="labels differ between the pictures"):
        infer(triton, PICTURES_NAME, {**pictures(golden[0][:2]), **labels})


def test_embeddings_without_labels_and_of_another_width_are_refused(triton, golden):
    files, _, embeds = golden
    with pytest.raises(InferenceServerException, match="text_embeds came without labels"):
        infer(triton, PICTURES_NAME, {**pictures(files[:1]), "text_embeds": embeds[None, :2]})
    with pytest.raises(InferenceServerException, match="shape"):
        infer(triton, PICTURES_NAME, {**pictures(files[:1]), **named(["a"], 1), "text_embeds": embeds[None, :1, :-1]})


# --- bad input --------------------------------------------------------------------------------------------------------


def test_a_bad_picture_has_its_own_error_and_the_others_their_answers(triton, golden, seven_pictures):
    files, _, embeds = golden
    whole = jpeg(seven_pictures[0])
    got = infer(triton, PICTURES_NAME, pictures([files[0], whole[: len(whole) // 2], b"<html>", b"", files[1], whole]))
    errors = texts(got["error"])
    assert [error[error.rfind("(") :] for error in errors] == ["", "(truncated)", "(not_an_image)", "(empty)", "", ""]
    np.testing.assert_allclose(got["image_embeds"][[0, 4]], embeds[:2], atol=ATOL)
    is_bad = np.array([error != "" for error in errors])
    assert (np.isnan(got["scores"]).all(1) == is_bad).all()
    assert [label == "" for label in texts(got["label"])] == list(is_bad)


def broken(pixel_values: np.ndarray, what: str) -> np.ndarray:
    return {
        "dtype": pixel_values.astype(np.float64),
        "size": pixel_values[..., 1:],
        "rank": pixel_values[0],
        "none": pixel_values[:0],
        "33": np.repeat(pixel_values[:1], 33, axis=0),
        "NaN": np.where(np.arange(pixel_values.shape[-1]) == 3, np.nan, pixel_values).astype(np.float32),
        "infinity": np.full_like(pixel_values, np.inf),
    }[what]


@pytest.mark.parametrize("by", ["http", "grpc"])
@pytest.mark.parametrize("what", ["dtype", "size", "rank", "none", "33", "NaN", "infinity"])
def test_pixels_that_cannot_be_are_refused_and_the_server_goes_on(triton, golden, what, by):
    _, pixel_values, embeds = golden
    with pytest.raises(InferenceServerException) as refusal:
        infer(triton, VISION_NAME, {"pixel_values": broken(pixel_values, what)}, by)
    assert ("pixel_values holds NaN or infinity" in str(refusal.value)) == (what in ("NaN", "infinity"))
    np.testing.assert_allclose(
        infer(triton, VISION_NAME, {"pixel_values": pixel_values}, by)["image_embeds"], embeds, atol=ATOL
    )


def test_a_refused_request_spoils_no_other_of_its_batch(triton, golden):
    _, pixel_values, embeds = golden
    nan = np.full_like(pixel_values, np.nan)

    def ask(number: int) -> bool:
        try:
            got = infer(triton, VISION_NAME, {"pixel_values": nan if number % 3 == 0 else pixel_values})
        except InferenceServerException:
            return number % 3 == 0
        np.testing.assert_allclose(got["image_embeds"], embeds, atol=ATOL)
        return number % 3 != 0

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(24)))


@pytest.mark.parametrize("strength", [-1, 1.5, np.nan])
def test_a_strength_out_of_range_is_refused(triton, golden, strength):
    files, pixel_values, _ = golden
    given = {"strength": np.full((1, 1), strength, np.float32)}
    for model, inputs in ((VISION_NAME, {"pixel_values": pixel_values[:1]}), (PICTURES_NAME, pictures(files[:1]))):
        with pytest.raises(InferenceServerException, match=r"strength is .*want 0"):
            infer(triton, model, {**inputs, **given})


@pytest.mark.parametrize("n", [0, 33])
def test_so_many_pictures_are_refused(triton, golden, n):
    with pytest.raises(InferenceServerException):
        infer(triton, PICTURES_NAME, {"picture": np.full((n, 1), golden[0][0], dtype=object)})


def test_a_body_of_100_mb_is_refused_and_the_server_goes_on(triton, golden):
    files, _, embeds = golden
    got = infer(triton, PICTURES_NAME, pictures([files[0], bytes(100_000_000)]))
    assert texts(got["error"])[1].endswith("(too_large)")
    np.testing.assert_allclose(got["image_embeds"][0], embeds[0], atol=ATOL)


# --- what there is to watch -------------------------------------------------------------------------------------------


def test_metrics_count_pictures_errors_and_what_the_defense_does(triton, golden):
    files = golden[0]

    def figures() -> dict[str, float]:
        names = ("pictures", "errors", "watched", "changed", "fired", "removed_energy")
        return {name: triton.metric(f"clip_defense_{name}") for name in names}

    infer(triton, PICTURES_NAME, pictures(files))
    before = figures()
    infer(triton, PICTURES_NAME, pictures([*files * 20, b""][-32:]))
    infer(triton, PICTURES_NAME, pictures((files * 20)[:32]))
    grown = {name: value - before[name] for name, value in figures().items()}
    assert (grown["pictures"], grown["errors"]) == (64, 1)
    assert grown["watched"] == 3  # a twentieth of 63
    assert 0 <= grown["changed"] <= grown["fired"] <= 3
    assert grown["removed_energy"] > 0
    assert 0 <= triton.metric("clip_defense_golden_difference") <= ATOL
    assert triton.metric("clip_defense_golden_removed_energy") > 0


# --- reload, restart --------------------------------------------------------------------------------------------------


@pytest.fixture
def fixed_labels(arranged, python, tmp_path):
    """A server of a bundle without a text tower, whose models are loaded when that is asked for."""
    bundle = arranged("triton-python", text=False)
    server = Triton(
        [bundle / REPOSITORY, bundle / PICTURE_REPOSITORY],
        tmp_path / "triton",
        python,
        "--model-control-mode=explicit",
        "--load-model=*",
    )
    with running(server):
        yield server, bundle


def test_models_are_reloaded_under_load_and_a_killed_server_answers_again(fixed_labels, golden):
    server, bundle = fixed_labels
    files, _, embeds = golden
    is_over = threading.Event()

    def ask() -> int:
        n = 0
        while not is_over.is_set():
            np.testing.assert_allclose(infer(server, PICTURES_NAME, pictures(files))["image_embeds"], embeds, atol=ATOL)
            n += 1
        return n

    with (
        ThreadPoolExecutor(2) as pool,
        http.InferenceServerClient(f"{HOST}:{server.http}", network_timeout=90) as client,
    ):
        asking = [pool.submit(ask) for _ in range(2)]
        try:
            for name in (VISION_NAME, "clip_defense_answer"):
                (bundle / _repository(bundle, name) / name / "1" / "model.py").touch()
                client.load_model(name)
        finally:
            is_over.set()
        assert all(each.result() > 0 for each in asking)

    with pytest.raises(InferenceServerException, match="this bundle has no text tower: it knows the labels"):
        infer(server, PICTURES_NAME, {**pictures(files[:1]), **named(["an unknown label", "another"], 1)})

    server.kill()
    assert status(server.ready) == 0
    server.start()
    np.testing.assert_allclose(infer(server, PICTURES_NAME, pictures(files))["image_embeds"], embeds, atol=ATOL)


def _repository(bundle: Path, name: str) -> str:
    return REPOSITORY if (bundle / REPOSITORY / name).is_dir() else PICTURE_REPOSITORY


def test_a_graph_that_does_not_compute_what_was_exported_is_not_served(arranged, python, tmp_path):
    bundle = arranged("triton-python", text=False)
    values = load_file(bundle / "golden.safetensors")
    values["image_embeds"] = np.ascontiguousarray(values["image_embeds"][::-1])
    save_file(values, bundle / "golden.safetensors")
    server = Triton([restated(bundle) / REPOSITORY], tmp_path / "triton", python, "--exit-on-error=false")
    try:
        server.start(waits=False)
        server.wait_for(lambda: "golden embeddings differ by" in server.log.read_text(errors="replace"))
        server.wait_for(lambda: status(f"http://{HOST}:{server.http}/v2/health/live") == 200)
        assert status(server.ready) != 200
        assert status(f"http://{HOST}:{server.http}/v2/models/{VISION_NAME}/ready") != 200
    finally:
        server.kill()


def test_a_repository_away_from_its_bundle_says_where_it_belongs(arranged, python, tmp_path):
    away = shutil.copytree(arranged("triton-python", text=False) / REPOSITORY, tmp_path / "away" / REPOSITORY)
    server = Triton([away], tmp_path / "triton", python, "--exit-on-error=false")
    try:
        server.start(waits=False)
        server.wait_for(
            lambda: "is no bundle; serve the repository from within" in server.log.read_text(errors="replace")
        )
    finally:
        server.kill()


def test_fault_136_every_model_says_of_a_numpy_that_the_backend_reads_it_wrongly(arranged, python, tmp_path):
    new = environment(tmp_path / "env", "--no-deps", "numpy>=2")
    (site_packages(new) / "others.pth").write_text(f"{site_packages(python)}\n", encoding="utf-8")
    bundle = arranged("triton-python")
    repositories = [bundle / REPOSITORY, bundle / PICTURE_REPOSITORY]
    server = Triton(repositories, tmp_path / "triton", new, "--exit-on-error=false")
    try:
        server.start(waits=False)
        server.wait_for(lambda: status(f"http://{HOST}:{server.http}/v2/health/live") == 200)
        with http.InferenceServerClient(f"{HOST}:{server.http}") as client:
            said = {model["name"]: model.get("reason", "") for model in client.get_model_repository_index()}
            assert not any(client.is_model_ready(name) for name in said)
    finally:
        server.kill()
    in_python = {name for name in said if list(bundle.glob(f"*/{name}/1/model.py"))}
    assert len(in_python) == 4
    for name in in_python:
        assert "cannot read arrays of numpy 2" in said[name]
        assert "install numpy<2 there" in said[name]
