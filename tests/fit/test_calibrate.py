"""Thresholds in place of a TopK rule: chosen well, judged on other pictures, and refused where they do not agree."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("open_clip")

import torch

from defense.classify.classifier import RobustClassifier
from defense.core.latents import LatentSet
from defense.core.sae import normalize
from defense.data.tokenizer import ClipTokenizer
from defense.errors import CalibrationError, ConfigError, ShapeError
from defense.fit.calibrate import best_threshold, calibrated
from defense.hosts.attach import is_wrapped
from defense.hosts.clip import Clip, load_clip
from defense.hosts.golden import golden_difference, make_golden
from defense.store import defenses

from ..conftest import D_SAE, random_defense, random_sae

S = tuple(range(0, 60, 3))
SPLIT = np.random.default_rng(0).permutation(40)


def pixels(n: int = 40) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(n).normal(size=(n, 3, 32, 32)).astype(np.float32))


@pytest.fixture
def clip(tiny_clip):
    return Clip(tiny_clip, random_defense(tiny_clip).preprocess, ClipTokenizer(16))


def topk_defense(clip, k: int = 8, edit: str = "scale", **fields):
    return random_defense(clip.model, (1, random_sae(act="topk", k=k, **fields), LatentSet("text", S, edit=edit)))


def embeds(clip, defense, pixel_values) -> np.ndarray:
    """Embeddings of a twin of the host, which itself stays undefended."""
    twin = load_clip(f"local-dir:{clip.model.folder}")
    return RobustClassifier(replace(twin, preprocess=clip.preprocess), defense).encode_pixels(pixel_values.numpy())


@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_best_threshold_is_the_best_of_all(n):
    rng = np.random.default_rng(n)
    acts = np.round(rng.exponential(size=n) + 0.05, 1)  # with ties
    is_kept = acts + rng.normal(size=n) > 1

    def wrong(threshold: float) -> float:
        return float((acts**2)[(acts > threshold) != is_kept].sum())

    threshold, energy = best_threshold(acts, is_kept)
    assert wrong(threshold) == pytest.approx(energy)
    assert energy == pytest.approx(min(wrong(each) for each in (0.0, *acts)))


def test_best_threshold_parts_what_can_be_parted():
    threshold, energy = best_threshold(np.array([3.0, 1.0, 4.0, 2.0]), np.array([True, False, True, False]))
    assert (threshold, energy) == (2.5, 0.0)


def test_a_rule_that_keeps_everything_is_met_exactly(clip):
    defense = topk_defense(clip, k=D_SAE)
    result, calibration = calibrated(clip, defense, pixels(), least_agreement=1.0)
    assert (calibration.agreement, calibration.wrong_energy) == (1.0, {"blocks.1.hook_resid_post": 0.0})
    assert calibration.cosine_worst == pytest.approx(1.0, abs=1e-6)
    assert (calibration.n_fitted, calibration.n_held_out) == (20, 20)
    assert (result.sites[0].sae_config.act, result.sites[0].sae_config.k) == ("batchtopk", None)


@pytest.mark.parametrize("edit", ["scale", "project"])
def test_what_is_reported_is_what_held_out_pictures_show(tiny_folder, clip, edit):
    defense, pixel_values = topk_defense(clip, edit=edit), pixels()
    clip.model.folder = tiny_folder
    text_embeds = torch.nn.functional.normalize(torch.randn(30, 32, generator=torch.Generator().manual_seed(0))).numpy()
    result, calibration = calibrated(clip, defense, pixel_values, least_agreement=0, text_embeds=text_embeds)
    want, got = (embeds(clip, each, pixel_values[SPLIT[1::2]]) for each in (defense, result))
    cosines = (want * got).sum(1)
    assert calibration.cosine_worst == pytest.approx(cosines.min(), abs=1e-6)
    assert calibration.cosine_mean == pytest.approx(cosines.mean(), abs=1e-6)
    same = (want @ text_embeds.T).argmax(1) == (got @ text_embeds.T).argmax(1)
    assert calibration.agreement == pytest.approx(same.mean())
    plain = embeds(clip, None, pixel_values[SPLIT[1::2]])
    assert cosines.min() > (want * plain).sum(1).min()  # closer to the exact defense than no defense is
    assert json.loads(json.dumps(result.provenance))["calibration"]["compared"] == "labels"


def test_without_labels_predictions_are_nearest_pictures(tiny_folder, clip):
    defense, pixel_values = topk_defense(clip), pixels()
    clip.model.folder = tiny_folder
    result, calibration = calibrated(clip, defense, pixel_values, least_agreement=0)
    anchors, want = (embeds(clip, defense, pixel_values[SPLIT[part::2]]) for part in (0, 1))
    got = embeds(clip, result, pixel_values[SPLIT[1::2]])
    assert calibration.compared == "pictures"
    assert calibration.agreement == pytest.approx(((want @ anchors.T).argmax(1) == (got @ anchors.T).argmax(1)).mean())


def test_pictures_of_a_group_stay_together_and_stand_for_one_prediction(tiny_folder, clip):
    pairs = torch.cat([pixels(), pixels() + 0.01])  # [2 n]: attacked ones, then their twins
    groups = np.tile(np.arange(40), 2) + 7
    defense = topk_defense(clip, k=40, edit="project")
    clip.model.folder = tiny_folder
    result, calibration = calibrated(clip, defense, pairs, least_agreement=0, groups=groups)
    fitted, held_out = (torch.from_numpy(np.stack([half, half + 40])) for half in (SPLIT[::2], SPLIT[1::2]))
    want, got = (embeds(clip, each, pairs[held_out.flatten()]) for each in (defense, result))
    anchors = embeds(clip, defense, pairs[fitted[0]])
    assert (calibration.n_fitted, calibration.n_held_out) == (40, 40)
    assert calibration.cosine_worst == pytest.approx((want * got).sum(1).min(), abs=1e-6)
    assert calibration.agreement == pytest.approx(((want @ anchors.T).argmax(1) == (got @ anchors.T).argmax(1)).mean())
    _, alone = calibrated(clip, defense, pairs, least_agreement=0)
    assert alone.cosine_mean != pytest.approx(calibration.cosine_mean, abs=1e-6)


def test_pictures_in_parts_count_as_if_they_were_joined(clip):
    pixel_values = pixels()
    defense = topk_defense(clip)
    _, joined = calibrated(clip, defense, pixel_values, least_agreement=0)
    _, in_parts = calibrated(clip, defense, [pixel_values[:7], pixel_values[7:7], pixel_values[7:]], least_agreement=0)
    assert in_parts == joined
    with pytest.raises(ShapeError, match="pixel_values is"):
        calibrated(clip, defense, [pixel_values, pixel_values[:, :1]], least_agreement=0)


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [(np.zeros(40), ConfigError, "all pictures are of one group"), (np.arange(20), ShapeError, r"\[20\], want \[40\]")],
)
def test_groups_that_cannot_be_kept_together_are_refused(clip, groups, error, message):
    with pytest.raises(error, match=message):
        calibrated(clip, topk_defense(clip), pixels(), groups=groups)


def test_latents_outside_the_sets_share_one_threshold_and_those_inside_have_their_own(clip):
    result, _ = calibrated(clip, topk_defense(clip), pixels(), least_agreement=0)
    threshold = result.sites[0].parameters["threshold"]
    outside = np.setdiff1d(np.arange(D_SAE), S)
    assert len(np.unique(threshold[outside])) == 1
    assert len(np.unique(threshold[list(S)])) > len(S) // 2
    assert (threshold >= 0).all()


def test_a_threshold_is_never_negative_where_the_rule_keeps_more_than_is_positive(clip):
    """The k-th largest pre-activation of most tokens is negative then; a threshold below 0 would let those count."""
    result, _ = calibrated(clip, topk_defense(clip, k=D_SAE), pixels(), least_agreement=0)
    outside = np.setdiff1d(np.arange(D_SAE), S)
    assert (result.sites[0].parameters["threshold"][outside] == 0).all()


def test_a_calibrated_defense_is_another_one_than_the_one_that_was_read(clip, tmp_path):
    loaded = defenses.load(defenses.save(topk_defense(clip), tmp_path / "exact"))
    assert loaded.manifest_sha256 is not None
    result, _ = calibrated(clip, loaded, pixels(), least_agreement=0)
    assert result.manifest_sha256 is None


@pytest.mark.parametrize(("scope", "tokens"), [("cls", slice(0, 1)), ("patch", slice(1, None))])
def test_thresholds_are_those_of_the_tokens_that_are_edited(clip, scope, tokens):
    sae = random_sae(act="topk", k=8)
    defense = random_defense(clip.model, (1, sae, LatentSet("text", tuple(range(D_SAE)), scope=scope)))
    _, calibration = calibrated(clip, defense, pixels(), least_agreement=0)
    rows = clip.tower.resid(pixels()[SPLIT[::2]], "blocks.1.hook_resid_post")[:, tokens].flatten(0, 1)
    pre_acts = (normalize(rows, sae.config.norm).z @ sae.W_enc + sae.folded_bias).numpy()
    kept = sae.encode(rows).numpy() > 0
    wrong = [best_threshold(h[h > 0], k[h > 0])[1] for h, k in zip(pre_acts.T, kept.T, strict=True) if (h > 0).any()]
    share = sum(wrong) / float((np.where(kept, pre_acts, 0) ** 2).sum())
    assert calibration.wrong_energy["blocks.1.hook_resid_post"] == pytest.approx(share, rel=1e-3)


def test_thresholds_that_do_not_agree_are_refused_and_the_host_stays_as_it_was(clip):
    text_embeds = torch.nn.functional.normalize(torch.randn(2000, 32, generator=torch.Generator().manual_seed(0)))
    before = RobustClassifier(clip).encode_pixels(pixels().numpy())
    with pytest.raises(CalibrationError, match=r"of 20 held-out pictures .* 100.00% were asked for") as caught:
        calibrated(clip, topk_defense(clip), pixels(), least_agreement=1.0, text_embeds=text_embeds.numpy())
    assert 0 < caught.value.agreement < 1
    assert not is_wrapped(clip.model)
    np.testing.assert_array_equal(RobustClassifier(clip).encode_pixels(pixels().numpy()), before)


def test_the_result_is_saved_with_golden_vectors_of_its_own_and_exports_as_delta(clip, tmp_path):
    from defense.hosts.attach import detach

    vision = pytest.importorskip("defense.export.vision")
    exact = topk_defense(clip)
    pictures = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    RobustClassifier(clip, exact)
    exact = replace(exact, golden=make_golden(clip, pictures))
    with pytest.raises(ConfigError, match="topk"):
        vision.VisionGraph(clip.model, "delta")
    detach(clip.model)
    result, _ = calibrated(clip, exact, pixels(), least_agreement=0)
    defenses.save(result, tmp_path / "out")
    clf = RobustClassifier(clip, defenses.load(tmp_path / "out"))
    assert golden_difference(clip, clf.defense.golden) < 1e-6
    assert np.abs(result.golden.defended - exact.golden.defended).max() > 1e-6
    graph = vision.VisionGraph(clip.model, "delta")
    with torch.no_grad(), graph.in_place():
        got, _ = graph(pixels(), torch.zeros(1, 32))
    np.testing.assert_allclose(got.numpy(), clf.encode_pixels(pixels().numpy()), atol=2e-6)


def test_a_site_without_a_topk_rule_stays_as_it_is(clip):
    relu = random_sae()
    defense = random_defense(
        clip.model, (0, relu, LatentSet("a", S)), (1, random_sae(act="topk", k=8), LatentSet("b", S))
    )
    result, calibration = calibrated(clip, defense, pixels(), least_agreement=0)
    assert result.sites[0] is defense.sites[0]
    assert list(calibration.wrong_energy) == ["blocks.1.hook_resid_post"]


@pytest.mark.parametrize(
    ("defense_of", "pixel_values", "error", "message"),
    [
        (lambda clip: random_defense(clip.model, (1, random_sae(), LatentSet("a", S))), pixels(), ConfigError, "alone"),
        (lambda clip: topk_defense(clip, topk_relu="none"), pixels(), ConfigError, "negative latents count"),
        (topk_defense, pixels(15), ConfigError, "15 pictures are too few"),
        (topk_defense, pixels()[:, :, :16], ShapeError, r"\[40, 3, 16, 32\], want \[n, 3, 32, 32\]"),
    ],
    ids=["no topk", "negative", "few", "shape"],
)
def test_what_cannot_be_calibrated_is_refused(clip, defense_of, pixel_values, error, message):
    with pytest.raises(error, match=message):
        calibrated(clip, defense_of(clip), pixel_values)
