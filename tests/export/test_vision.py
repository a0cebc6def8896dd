"""The traced vision graph: equal to the wrapped model, before and after torch.onnx."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("open_clip")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import onnx
import onnxruntime as ort
import torch
from onnx.reference import ReferenceEvaluator

from defense.classify.classifier import RobustClassifier
from defense.core.latents import LatentSet
from defense.core.norms import is_high
from defense.core.ops import reference
from defense.core.sae import SparseAutoencoder
from defense.data.tokenizer import ClipTokenizer
from defense.errors import ConfigError
from defense.export import coordinates, vision
from defense.hosts.attach import attached
from defense.hosts.clip import Clip

from ..conftest import random_defense, random_sae

S = tuple(range(20))
GAINS = tuple(np.linspace(0, 1, 20))
TOPK = random_sae(act="topk", k=8)


def silent(sae: SparseAutoencoder) -> SparseAutoencoder:
    """The same SAE with no latent of S ever active."""
    parameters = sae.parameters_numpy()
    parameters["b_enc"][list(S)] -= 1000
    return SparseAutoencoder(sae.config, parameters)


RULES = {
    "relu": ("delta", [(1, random_sae(), LatentSet("text", S, GAINS))]),
    "jumprelu, layer norm": ("delta", [(1, random_sae(act="jumprelu", norm="layer_norm"), LatentSet("text", S))]),
    "batchtopk, rescaled": (
        "delta",
        [(1, random_sae(act="batchtopk", norm="constant_norm_rescale"), LatentSet("text", S))],
    ),
    "gated, patches": ("delta", [(1, random_sae(act="gated"), LatentSet("text", S, scope="patch"))]),
    "relu, set": ("delta", [(1, random_sae(), LatentSet("text", S, GAINS, "set", values=(0.5,) * 20))]),
    "relu, project": ("delta", [(1, random_sae(), LatentSet("text", S, GAINS, "project"))]),
    "topk": ("exact", [(1, TOPK, LatentSet("text", S, GAINS))]),
    "topk without relu": ("exact", [(1, random_sae(act="topk", k=8, topk_relu="none"), LatentSet("text", S))]),
    "topk, project": ("exact", [(1, TOPK, LatentSet("text", S, edit="project"))]),
    "topk, static": ("static", [(1, TOPK, LatentSet("text", S, scope="patch"))]),
    "topk of which none fires": ("exact", [(1, silent(TOPK), LatentSet("text", S))]),
    "project of which none fires": ("exact", [(1, silent(TOPK), LatentSet("text", S, edit="project"))]),
    "relu, sparing": ("delta", [(1, random_sae(), LatentSet("text", S, GAINS, spares_high_norm=True))]),
    "topk, project, sparing": (
        "exact",
        [(1, TOPK, LatentSet("text", S, edit="project", scope="patch", spares_high_norm=True))],
    ),
    "topk, static, sparing": ("static", [(1, TOPK, LatentSet("text", S, spares_high_norm=True))]),
    "an empty set": ("delta", [(1, random_sae(), LatentSet("text", ()))]),
    "two blocks": (
        "exact",
        [(1, random_sae(), LatentSet("a", S, scope="patch")), (2, TOPK, LatentSet("b", S, edit="project"))],
    ),
}


def classifier(model, sites) -> RobustClassifier:
    model = copy.deepcopy(model)
    defense = random_defense(model, *sites) if sites else None
    clip = Clip(model, random_defense(model).preprocess, ClipTokenizer(16))
    return RobustClassifier(clip, defense).set_labels(["dog", "cat", "red fish"])


def pixels(batch: int) -> np.ndarray:
    return np.random.default_rng(batch).normal(size=(batch, 3, 32, 32)).astype(np.float32)


def expected(clf: RobustClassifier, pixel_values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    image_embeds = clf.encode_pixels(pixel_values)
    return image_embeds, float(clf.clip.model.logit_scale.exp()) * image_embeds @ clf.text_embeds().T


def with_a_store(clip: Clip):
    """Let the tower make one patch far longer than the others from block 0 on, as large towers do."""
    return clip.tower.changed(
        "blocks.0.hook_resid_post", lambda resid: resid * (1 + 19 * (torch.arange(17) == 5))[:, None]
    )


@pytest.mark.parametrize("name", [name for name in RULES if "sparing" in name])
def test_a_graph_spares_the_patches_that_the_wrapped_model_spares(tiny_clip, name):
    mode, [(block, sae, latent_set)] = RULES[name]
    clf, touching = (
        classifier(tiny_clip, [(block, sae, replace(latent_set, spares_high_norm=spares))]) for spares in (True, False)
    )
    with with_a_store(clf.clip), with_a_store(touching.clip):
        want, other = clf.encode_pixels(pixels(4)), touching.encode_pixels(pixels(4))
        graph = vision.VisionGraph(clf.clip.model, mode)
        with torch.no_grad(), graph.in_place():
            got, _ = graph(torch.from_numpy(pixels(4)), torch.from_numpy(clf.text_embeds()))
    np.testing.assert_allclose(got.numpy(), want, atol=2e-6)
    assert np.abs(want - other).max() > 1e-3, "there are patches to spare"


def test_what_counts_as_high_in_a_graph_is_what_counts_as_high():
    generator = torch.Generator().manual_seed(0)
    for n in (1, 2, 7, 16):
        resid = torch.randn(50, 2 + n, 8, generator=generator) * torch.rand(50, 2 + n, 1, generator=generator) ** 3
        high = vision._is_high(resid, 2)
        assert torch.equal(high[:, 2:].bool(), is_high(resid[:, 2:]))
        assert not high[:, :2].any()
    assert high.any()


@pytest.mark.parametrize("name", RULES)
def test_traced_edit_equals_the_wrapped_model(tiny_clip, name):
    mode, sites = RULES[name]
    clf = classifier(tiny_clip, sites)
    pixel_values = pixels(4)
    want = clf.encode_pixels(pixel_values)
    graph = vision.VisionGraph(clf.clip.model, mode)
    with torch.no_grad(), graph.in_place():
        got, _ = graph(torch.from_numpy(pixel_values), torch.from_numpy(clf.text_embeds()))
    np.testing.assert_allclose(got.numpy(), want, atol=2e-6)
    stock = vision.VisionGraph(classifier(tiny_clip, []).clip.model)
    with torch.no_grad(), stock.in_place():
        plain, _ = stock(torch.from_numpy(pixel_values), torch.from_numpy(clf.text_embeds()))
    if "none fires" in name or "empty" in name:
        np.testing.assert_array_equal(got.numpy(), plain.numpy())
    else:
        assert np.abs(want - plain.numpy()).max() > 1e-3
    np.testing.assert_array_equal(clf.encode_pixels(pixel_values), want)  # the model is as it was


def test_strength_is_baked_in(tiny_clip):
    clf = classifier(tiny_clip, RULES["topk"][1])
    attached(clf.clip.model).set_strength(0.5)
    graph = vision.VisionGraph(clf.clip.model, "exact")
    with torch.no_grad(), graph.in_place():
        got, _ = graph(torch.from_numpy(pixels(2)), torch.from_numpy(clf.text_embeds()))
    np.testing.assert_allclose(got.numpy(), clf.encode_pixels(pixels(2)), atol=2e-6)


def traced(clf: RobustClassifier, mode: str):
    graph = vision.VisionGraph(clf.clip.model, mode)
    return vision.trace_vision(graph, (32, 32), torch.from_numpy(clf.text_embeds()))


def session_of(path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def written(model, folder) -> ort.InferenceSession:
    """The session of a traced graph that was written and passes onnx's own check."""
    vision.write(model, folder / "model.onnx", {"note": "kept"})
    onnx.checker.check_model(folder / "model.onnx", full_check=True)
    return session_of(folder / "model.onnx")


@pytest.fixture(scope="module")
def topk(tiny_classifier, tiny_graphs, tmp_path_factory):
    """A classifier with a TopK defense that projects, and its graph."""
    return tiny_classifier, written(tiny_graphs["trace_vision"], tmp_path_factory.mktemp("graph"))


@pytest.mark.parametrize("batch", [1, 2, 5, 32])
def test_graph_equals_torch_at_batches_it_was_not_traced_with(topk, batch):
    clf, session = topk
    got = session.run(None, {"pixel_values": pixels(batch)})
    want = expected(clf, pixels(batch))
    np.testing.assert_allclose(got[0], want[0], atol=1e-5)
    np.testing.assert_allclose(got[1], want[1], atol=1e-4)


def test_rows_of_a_batch_equal_their_solo_runs(topk):
    _, session = topk
    together = session.run(None, {"pixel_values": pixels(5)})[0]
    alone = np.concatenate([session.run(None, {"pixel_values": row[None]})[0] for row in pixels(5)])
    np.testing.assert_allclose(together, alone, atol=1e-6)


def test_names_and_axes_are_those_of_the_contract(topk):
    _, session = topk
    assert [(i.name, i.shape) for i in session.get_inputs()] == [("pixel_values", ["batch", 3, 32, 32])]
    assert [(o.name, o.shape) for o in session.get_outputs()] == [
        ("image_embeds", ["batch", 32]),
        ("logits_per_image", ["batch", "n_labels"]),
    ]
    assert session.get_modelmeta().custom_metadata_map["note"] == "kept"


def test_labels_are_baked_in_and_replaced_by_what_is_fed(topk):
    clf, session = topk
    other = np.random.default_rng(0).normal(size=(7, 32)).astype(np.float32)
    image_embeds, logits = session.run(None, {"pixel_values": pixels(2), "text_embeds": other})
    scale = float(clf.clip.model.logit_scale.exp())
    np.testing.assert_allclose(logits, scale * image_embeds @ other.T, atol=1e-4)
    assert session.run(None, {"pixel_values": pixels(2)})[1].shape == (2, 3)


# --- nothing fires, or there is nothing ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def proto(tiny_graphs) -> onnx.ModelProto:
    """The graph of the TopK defense that projects."""
    return vision.ir.to_proto(tiny_graphs["trace_vision"])


def with_bias(proto: onnx.ModelProto, bias: float) -> onnx.ModelProto:
    """The same graph with another bias of the latents of S: with a low one none of them ever fires."""
    changed = onnx.ModelProto()
    changed.CopyFrom(proto)
    (tensor,) = [tensor for tensor in changed.graph.initializer if tensor.name.endswith(".b_S")]
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.full(tensor.dims, bias, np.float32), tensor.name))
    return changed


def everything_in(proto: onnx.ModelProto, pixel_values: np.ndarray) -> dict[str, np.ndarray]:
    """What every operator gives and takes, by onnx's own implementation."""
    run = ReferenceEvaluator(proto).run
    results = run(None, {"pixel_values": pixel_values}, intermediate=True)
    return {name: value for name, value in results.items() if isinstance(value, np.ndarray)}


def test_fault_111_no_operator_meets_an_empty_tensor_where_nothing_fires(proto):
    values = everything_in(with_bias(proto, -1e30), pixels(2))
    assert [node.op_type for node in proto.graph.node].count("TopK") == 2
    assert len(values) > 100
    used = {name for node in proto.graph.node for name in (*node.input, *node.output)}
    assert [name for name, value in values.items() if name in used and value.ndim and value.size == 0] == []


def test_fault_111_topk_meets_a_row_in_an_empty_batch_too(proto):
    values = everything_in(proto, pixels(1)[:0])
    assert values["image_embeds"].shape == (0, 32)
    ranked = [node.input[0] for node in proto.graph.node if node.op_type == "TopK"]
    assert [len(values[name]) for name in ranked] == [1, 1]


@pytest.mark.parametrize("bias", [None, -1e30], ids=["firing", "quiet"])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_onnx_s_own_implementation_agrees(proto, bias, batch):
    changed = proto if bias is None else with_bias(proto, bias)
    session = ort.InferenceSession(changed.SerializeToString(), providers=["CPUExecutionProvider"])
    pixel_values = pixels(3)[:batch]
    got = ReferenceEvaluator(changed).run(None, {"pixel_values": pixel_values})
    np.testing.assert_allclose(got[0], session.run(None, {"pixel_values": pixel_values})[0], atol=1e-6)


def test_a_loop_says_from_the_start_whether_it_runs(proto):
    loops = [node for node in proto.graph.node if node.op_type == "Loop"]
    assert len(loops) == 1
    assert all(node.input[1] for node in loops)


def test_silent_biases_have_the_names_that_the_graph_gives_them(tiny_classifier, proto):
    biases = vision.silent_biases(vision.VisionGraph(tiny_classifier.clip.model))
    shapes = {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
    assert {name: bias.shape for name, bias in biases.items()} == {"blocks.0.edits.0.suppressor.b_S": (20,)}
    assert biases.keys() <= shapes.keys()


def openvino_answers(path, pixel_values: np.ndarray) -> np.ndarray:
    """The embeddings by OpenVINO; the test is skipped where that is not installed."""
    openvino = pytest.importorskip("openvino")
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled([pixel_values])[0]


@pytest.mark.parametrize("bias", [None, -1e30], ids=["firing", "quiet"])
def test_openvino_agrees(proto, tmp_path, bias):
    onnx.save(proto if bias is None else with_bias(proto, bias), tmp_path / "model.onnx")
    session = session_of(tmp_path / "model.onnx")
    for batch in (0, 1, 3):
        pixel_values = pixels(3)[:batch]
        got = openvino_answers(tmp_path / "model.onnx", pixel_values)
        np.testing.assert_allclose(got, session.run(None, {"pixel_values": pixel_values})[0], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_openvino_agrees_on_every_rule(tiny_clip, tmp_path, name):
    pytest.importorskip("openvino")
    mode, sites = RULES[name]
    session = written(traced(classifier(tiny_clip, sites), mode), tmp_path)
    got = openvino_answers(tmp_path / "model.onnx", pixels(5))
    np.testing.assert_allclose(got, session.run(None, {"pixel_values": pixels(5)})[0], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_every_rule_goes_through_onnx_with_plain_operators(tiny_clip, tmp_path, name):
    mode, sites = RULES[name]
    clf = classifier(tiny_clip, sites)
    session = written(traced(clf, mode), tmp_path)
    for batch in (1, 2, 5):
        got = session.run(None, {"pixel_values": pixels(batch)})
        np.testing.assert_allclose(got[0], expected(clf, pixels(batch))[0], atol=1e-5)
    empty = session.run(None, {"pixel_values": pixels(1)[:0]})
    assert [array.shape for array in empty] == [(0, 32), (0, 3)]
    if sites[0][2].latents:
        with attached(clf.clip.model).bypassed():
            plain = expected(clf, pixels(5))[0]
        got = session.run(None, {"pixel_values": pixels(5), "strength": np.zeros(1, np.float32)})
        np.testing.assert_allclose(got[0], plain, atol=1e-6)
    model = onnx.load(tmp_path / "model.onnx")
    assert {entry.domain for entry in model.opset_import} == {""}
    data_dependent = {"NonZero", "Loop"} & {node.op_type for node in model.graph.node}
    assert bool(data_dependent) == ((mode == "exact" and "without relu" not in name) or "project" in name)


@pytest.mark.parametrize("tokens", [0, 1, 6])
def test_elimination_in_onnx_equals_the_solver(coordinates_session, tokens):
    rng = np.random.default_rng(tokens)
    fires = (rng.random((tokens, 7)) < 0.4).astype(np.float32)
    rows = rng.normal(size=(7, 12))
    rows[1] = rows[0] * (1 + 1e-5)  # nearly parallel, as similar latents are
    inputs = {"fires": fires, "gram": rows @ rows.T, "dots": rng.normal(size=(tokens, 12)) @ rows.T}
    (got,) = coordinates_session.run(None, inputs)
    want = coordinates.coordinates(*(torch.from_numpy(array) for array in inputs.values())).numpy()
    assert got.shape == want.shape
    np.testing.assert_allclose(got @ rows, want @ rows, atol=1e-6)
    assert not got[fires == 0].any()


@pytest.fixture(scope="module")
def coordinates_session():
    class Solve(torch.nn.Module):
        def forward(self, fires, gram, dots):
            return coordinates.coordinates(fires, gram, dots)

    example = {
        "fires": torch.ones(3, 7),
        "gram": torch.eye(7, dtype=torch.float64),
        "dots": torch.ones(3, 7, dtype=torch.float64),
    }
    model = vision.trace(Solve(), example, {"fires": "tokens", "dots": "tokens"}, ("answer",))
    return ort.InferenceSession(vision.ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])


def test_ridge_is_the_reference_s():
    assert coordinates._RIDGE == reference._RIDGE


@pytest.mark.parametrize(
    ("mode", "sites", "message"),
    [
        ("delta", RULES["topk"][1], "cannot hold the topk SAE at blocks.1"),
        ("static", RULES["topk, project"][1], "'project'"),
        ("fast", RULES["relu"][1], "must be one of delta, exact, static"),
    ],
)
def test_a_mode_that_does_not_go_with_the_defense_is_refused(tiny_clip, mode, sites, message):
    with pytest.raises(ConfigError, match=message):
        vision.VisionGraph(classifier(tiny_clip, sites).clip.model, mode)


def test_a_tower_in_half_precision_is_edited_in_float32(tiny_clip):
    clf = classifier(tiny_clip, RULES["relu"][1])
    want = clf.encode_pixels(pixels(4))
    clf.clip.model.visual.half()
    graph = vision.VisionGraph(clf.clip.model, "delta")
    with torch.no_grad(), graph.in_place():
        got, _ = graph(torch.from_numpy(pixels(4)), torch.from_numpy(clf.text_embeds()))
    assert got.dtype == torch.float32
    assert (got.numpy() * want).sum(1).min() > 0.999
    assert 1e-5 < np.abs(got.numpy() - want).max() < 1e-2


def test_a_stock_clip_exports_too(tiny_clip):
    clf = classifier(tiny_clip, [])
    graph = vision.VisionGraph(clf.clip.model)
    with torch.no_grad(), graph.in_place():
        got, _ = graph(torch.from_numpy(pixels(2)), torch.from_numpy(clf.text_embeds()))
    np.testing.assert_allclose(got.numpy(), clf.encode_pixels(pixels(2)), atol=2e-6)


def test_weights_beyond_the_limit_go_to_a_file_beside_the_graph(topk, tiny_graphs, tmp_path, monkeypatch):
    _, session = topk
    monkeypatch.setattr(vision, "ONE_FILE_BYTES", 1000)
    vision.write(tiny_graphs["trace_vision"], tmp_path / "model.onnx", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    beside = session_of(tmp_path / "model.onnx")
    feed = {"pixel_values": pixels(2)}
    np.testing.assert_array_equal(beside.run(None, feed)[0], session.run(None, feed)[0])
