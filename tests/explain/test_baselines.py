"""What neurons, channels and random directions come to: against plain computations, and where the answer is planted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("open_clip")
import timm
import torch

from defense.errors import ConfigError, NonFiniteError
from defense.explain import catalogue
from defense.explain.baselines import Others, Sweep, latent_units, median_of, sweep
from defense.explain.likeness import Likeness
from defense.explain.other_encoder import OtherEncoder, read_embeds
from defense.explain.steering import Steering
from defense.hosts.clip import Clip
from defense.hosts.families import tower_of
from defense.hosts.neurons import Neurons

from ..conftest import D_MODEL, D_SAE, clip_of, random_sae
from .described import POINT, WORDS, described, sparse_sae
from .planted import PlantedClip


@pytest.fixture
def clip(tiny_clip) -> Clip:
    return clip_of(tiny_clip)


def pixels_of(pictures) -> torch.Tensor:
    return torch.from_numpy(np.stack([each.pixel_values for each in pictures]))


# --- neurons ----------------------------------------------------------------------------------------------------------


def timm_with_layer_scale():
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": D_MODEL, "depth": 3, "num_heads": 2, "num_classes": 0}
    return timm.models.VisionTransformer(**sizes, init_values=0.3).eval().requires_grad_(False)


@pytest.mark.parametrize("kind", ["open_clip", "timm", "transformers"])
def test_neurons_times_their_rows_are_what_the_mlp_writes(tiny_clip, kind):
    """Of a block, by silencing its MLP: what is then missing is the neurons' part, and the bias."""
    if kind == "transformers":
        pytest.importorskip("transformers")
        from ..hosts.twins import open_clip_pair

        model = open_clip_pair()[1]
    else:
        model = tiny_clip if kind == "open_clip" else timm_with_layer_scale()
    tower, pixels = tower_of(model), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    neurons = Neurons(tower, POINT)
    with torch.inference_mode(), neurons.watched() as seen:
        whole = tower.resid(pixels, POINT)
        (hidden,) = seen
        last = neurons._last
        last.weight.zero_()
        missing = whole - tower.resid(pixels, POINT)
    assert hidden.shape == (2, 17, 4 * D_MODEL)
    torch.testing.assert_close(hidden @ neurons.rows, missing, atol=1e-4, rtol=1e-3)
    assert neurons.rows.norm(dim=1).min() > 0


def test_a_block_without_an_mlp_has_no_neurons_and_the_rest_goes_on(clip, pictures, monkeypatch):
    for block in clip.tower.blocks:
        block.mlp = torch.nn.Sequential(torch.nn.Linear(D_MODEL, 7), torch.nn.Identity(), _Back())
    with pytest.raises(ConfigError, match="no neurons"):
        Neurons(clip.tower, POINT)
    found = described(clip, pictures).provenance["baselines"]
    assert "no neurons" in found["no_neurons"]
    assert list(found["steerability"]["kinds"]) == ["latents", "channels", "random"]


class _Back(torch.nn.Module):
    """Widens without a linear layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(x, (0, D_MODEL - x.shape[-1]))


# --- steering ---------------------------------------------------------------------------------------------------------


def planted(norm: str = "none") -> Steering:
    resid = 0.1 * torch.randn(3, 4, 40, generator=torch.Generator().manual_seed(0))
    resid[..., 39] = 30.0
    return Steering(PlantedClip(), POINT, resid, torch.eye(5), norm)


def test_just_the_channels_that_were_planted_are_steerable_and_reach_their_words():
    steering = planted()
    eye = torch.eye(40)
    units = {
        "latents": (eye[:5], steering.read[..., :5]),
        "channels": (eye, steering.read),
        "random": (eye[5:25], steering.read[..., 5:25]),
    }
    found = sweep(steering, units, 100, 0, (0.001, 1.0))
    assert found.n == {"latents": 5, "channels": 40, "random": 20}
    assert found.n_steerable == {"latents": (0, 5), "channels": (0, 5), "random": (0, 0)}
    assert found.n_reached == {"latents": (0, 5), "channels": (0, 5), "random": (0, 0)}
    assert found.strength == 1.0
    assert found.separates
    nothing = sweep(steering, units | {"latents": (eye[:0], steering.read[..., :0])}, 4, 0)
    assert nothing.n["latents"] == 0
    assert not nothing.separates
    assert nothing.n["channels"] == 4


@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm_rescale"])
def test_steering_sets_a_unit_to_the_same_value_on_every_token(tiny_clip, norm):
    """What is pushed through the network has that value along the unit's row, in what the encoder sees."""
    clip = clip_of(tiny_clip)
    resid = torch.randn(2, 17, D_MODEL, generator=torch.Generator().manual_seed(0))
    steering = Steering(clip, POINT, resid, torch.eye(32)[:5], norm)
    seen = []
    steering._answers = lambda edited: seen.append(edited) or torch.zeros(len(edited), 5)
    others = Others(clip.tower, POINT, 0)
    rows, values = others.units(steering, None)["random"]
    list(steering.moves(rows[:3], values[..., :3], 1.5))
    edited = seen[0].unflatten(0, (3, 2))
    for unit in range(3):
        along = edited[unit] if steering.scale is None else edited[unit] / steering.scale
        torch.testing.assert_close(along @ rows[unit], torch.full((2, 17), 1.5 * steering.size), atol=1e-3, rtol=1e-4)
        across = torch.eye(D_MODEL) - torch.outer(rows[unit], rows[unit])
        torch.testing.assert_close(edited[unit] @ across, resid @ across, atol=1e-3, rtol=1e-4)


def test_the_strength_is_the_one_at_which_latents_are_ahead_by_most():
    made = Sweep(
        (0.5, 1.0, 2.0), {"latents": 100, "random": 100}, {"latents": (5, 30, 60), "random": (4, 10, 55)}, {}, 9
    )
    assert made.strength == 1.0
    assert made.separates
    alike = Sweep((0.5, 2.0), {"latents": 50, "random": 50}, {"latents": (3, 25), "random": (2, 24)}, {}, 9)
    assert not alike.separates
    assert alike.strength == 0.5, "of equal leads the least"


def test_a_word_that_is_only_made_unlikely_is_not_reached():
    resid = 0.01 * torch.randn(3, 4, 40, generator=torch.Generator().manual_seed(0))
    resid[..., 0] += 20  # the first word is certain; without it the four others share what it had
    steering = Steering(PlantedClip(), POINT, resid, torch.eye(5), "none")
    away = -torch.eye(40)[:1]
    units = {"latents": (away, -resid[..., :1]), "random": (torch.eye(40)[20:21], resid[..., 20:21])}
    found = sweep(steering, units, 5, 0, (1.0,))
    assert found.n_steerable == {"latents": (1,), "random": (0,)}
    assert found.n_reached == {"latents": (0,), "random": (0,)}


@pytest.mark.parametrize("norm", ["none", "constant_norm_rescale"])
def test_neurons_ready_to_steer_write_what_they_write(tiny_clip, norm):
    clip = clip_of(tiny_clip)
    others = Others(clip.tower, POINT, 0)
    resid = torch.randn(2, 17, D_MODEL, generator=torch.Generator().manual_seed(0))
    hidden = torch.rand(2, 17, 4 * D_MODEL, generator=torch.Generator().manual_seed(1))
    steering = Steering(clip, POINT, resid, torch.eye(32)[:5], norm)
    rows, values = others.units(steering, hidden)["neurons"]
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(4 * D_MODEL))
    written = values @ rows if steering.scale is None else steering.scale * (values @ rows)
    torch.testing.assert_close(written, hidden @ others.neurons.rows, atol=1e-4, rtol=1e-4)


def test_latents_that_fire_are_the_ones_that_are_steered(clip, pictures):
    steering = Steering(clip, POINT, clip.tower.resid(pixels_of(pictures[:2]), POINT), torch.eye(32)[:5], "none")
    fires = torch.zeros(D_SAE, dtype=torch.bool)
    fires[[3, 70]] = True
    sae = random_sae()
    rows, acts = latent_units(sae, steering, fires)
    assert torch.equal(rows, sae.W_dec[[3, 70]])
    torch.testing.assert_close(acts, sae.encode(steering.read)[..., [3, 70]])


# --- monosemanticity --------------------------------------------------------------------------------------------------


def by_pairs(largest: np.ndarray, embeds: np.ndarray) -> float:
    a = largest - largest.min()
    weights = np.outer(a, a)
    np.fill_diagonal(weights, 0)
    return float((weights * (embeds @ embeds.T)).sum() / weights.sum())


def test_units_of_each_kind_have_the_score_of_all_pairs_of_pictures(clip, pictures):
    others, tower = Others(clip.tower, POINT, 0), clip.tower
    with torch.inference_mode(), others.watched() as seen:
        resid, embeds = tower.resid_and_embeds(pixels_of(pictures), POINT)
        hidden = seen.pop()
        for part in (slice(0, 5), slice(5, None)):
            others.add(resid[part], hidden[part], embeds[part], slice(1, None))
    values = {"neurons": hidden, "channels": resid, "random": resid @ others.random.T}
    for kind, each in values.items():
        largest = each[:, 1:].amax(1).double().numpy()
        got = others.likeness[kind].scores().numpy()
        assert len(got) == each.shape[-1]
        for unit in (0, 7, 30):
            assert got[unit] == pytest.approx(by_pairs(largest[:, unit], embeds.double().numpy()), abs=1e-5)
    cosines = (embeds @ embeds.T).numpy()
    want = cosines[~np.eye(len(cosines), dtype=bool)].mean()
    assert others.likeness["random"].all_pairs() == pytest.approx(want, abs=1e-6)


def test_a_unit_that_fires_on_one_cluster_is_monosemantic_by_the_encoder_that_knows_it():
    likeness = Likeness(2, torch.device("cpu"))
    embeds = torch.eye(2)[[0, 0, 0, 1, 1, 1]]
    acts = torch.tensor([[1.0, 1, 1, 0, 0, 0], [1, 0, 1, 0, 1, 0]]).T
    likeness.add(acts, embeds)
    scores = likeness.scores().tolist()
    assert scores[0] == pytest.approx(1)
    assert scores[1] == pytest.approx(1 / 3)


def test_another_encoder_takes_the_place_of_the_clip_for_that_alone(clip, pictures, tmp_path):
    embeds = np.random.default_rng(5).normal(size=(len(pictures), 3))
    order = np.random.default_rng(6).permutation(len(pictures))
    np.savez(tmp_path / "dino.npz", names=np.array([pictures[i].key for i in order]), embeds=embeds[order])
    own, other = described(clip, pictures), described(clip, pictures, encoder=read_embeds(tmp_path / "dino.npz"))
    assert other.provenance["baselines"]["monosemanticity"]["encoder"] == "dino.npz"
    unit = embeds / np.linalg.norm(embeds, axis=1, keepdims=True)
    with torch.inference_mode():
        acts = sparse_sae().encode(clip.tower.resid(pixels_of(pictures), POINT)).amax(1).double().numpy()
    got = other.columns["monosemanticity"]
    known = np.flatnonzero(~np.isnan(got))[:10]
    np.testing.assert_allclose(got[known], [by_pairs(acts[:, latent], unit) for latent in known], atol=1e-5)
    for name in own.columns:
        if name != "monosemanticity":
            np.testing.assert_array_equal(own.columns[name], other.columns[name])
    assert not np.allclose(own.columns["monosemanticity"][known], got[known], atol=1e-3)


@pytest.mark.parametrize(
    ("names", "embeds", "said"),
    [
        (np.array(["0.png"]), np.ones((1, 3)), "no embedding of the picture 1.png"),
        (np.array(["a", "a"]), np.ones((2, 3)), "come twice"),
        (np.array(["a", "b"]), np.ones((3, 3)), "want embeds"),
        (np.array(["a", "b"]), np.ones((2, 3), int), "want embeds"),
        (np.array(["a", "b"]), np.zeros((2, 3)), "is zero"),
        (np.array([1, 2]), np.ones((2, 3)), "must be strings"),
        (np.array(["a", None], object), np.ones((2, 3)), "as objects"),
    ],
    ids=["missing", "twice", "lengths", "integers", "zero", "numbers", "pickled"],
)
def test_embeddings_that_do_not_fit_are_refused(clip, pictures, tmp_path, names, embeds, said):
    np.savez(tmp_path / "e.npz", names=names, embeds=embeds)
    with pytest.raises(ConfigError, match=said):
        described(clip, pictures, encoder=read_embeds(tmp_path / "e.npz"))


def test_files_that_hold_no_embeddings_are_refused(tmp_path):
    (tmp_path / "e.npz").write_bytes(b"PK\x03\x04 half a zip")
    np.save(tmp_path / "e.npy", np.ones(3))
    np.savez(tmp_path / "other.npz", x=np.ones(3))
    for name in ("e.npz", "e.npy", "other.npz"):
        with pytest.raises(ConfigError, match="no file of embeddings"):
            read_embeds(tmp_path / name)
    with pytest.raises(NonFiniteError):
        OtherEncoder(["a"], np.array([[np.nan, 1.0]]), "e")


# --- figures ----------------------------------------------------------------------------------------------------------


def test_a_median_lies_in_its_interval_and_covers_the_true_one():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        found = median_of(np.append(rng.normal(size=101), np.nan))
        assert found["n"] == 101
        assert found["low"] <= found["median"] <= found["high"]
        covered += found["low"] <= 0 <= found["high"]
    assert 182 <= covered <= 200
    assert median_of(np.full(3, np.nan)) == {"n": 0}


def test_a_catalogue_keeps_its_baselines_on_disk_and_one_without_them_loads(clip, pictures, tmp_path):
    made = described(clip, pictures, n_sampled=6)
    catalogue.save([made], tmp_path / "c")
    loaded = catalogue.load(tmp_path / "c")[POINT]
    assert loaded.provenance["baselines"] == made.provenance["baselines"]
    swept = loaded.provenance["baselines"]["steerability"]
    assert set(swept["kinds"]) == {"latents", "neurons", "channels", "random"}
    assert all(len(kind["share"]) == len(swept["strengths"]) for kind in swept["kinds"].values())
    assert swept["kinds"]["neurons"]["n"] == 6
    assert swept["n_words"] == len(WORDS)
    assert loaded.provenance["steer"] == swept["strength"]
    older = replace(made, provenance={key: each for key, each in made.provenance.items() if key != "baselines"})
    catalogue.save([older], tmp_path / "older")
    assert "baselines" not in catalogue.load(tmp_path / "older")[POINT].provenance


@pytest.mark.parametrize("name", ["photo", "embedded", "embedded:waterbirds", "embedded:celeba"])
def test_every_catalogue_ships_with_its_baselines(name):
    found = catalogue.find(name)
    assert found
    for each in found.values():
        swept = each.provenance["baselines"]["steerability"]
        assert set(swept["kinds"]) == {"latents", "neurons", "channels", "random"}
        assert each.provenance["steer"] == swept["strength"]
