"""What is known of latents: each column against a plain computation, names that were planted, files that hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("open_clip")
import torch
from PIL import Image

from defense.core.latents import LatentSet
from defense.data.preprocess import Preprocess
from defense.data.sources import open_pictures
from defense.data.tokenizer import ClipTokenizer
from defense.errors import CheckpointError, ConfigError, IntegrityError, ShapeError
from defense.explain import catalogue
from defense.explain.catalogue import BIN_EDGES, MANIFEST, Catalogue
from defense.explain.describe import describe, examples
from defense.explain.naming import mean_jacobians, sparse_words, steerability
from defense.explain.sums import Example
from defense.hosts.attach import wrap
from defense.hosts.clip import Clip
from defense.hosts.defense import Site
from defense.hosts.families import tower_of
from defense.hosts.slim import slim_site

from ..conftest import D_SAE, random_defense, random_sae

POINT = "blocks.1.hook_resid_post"
WORDS = ("dog", "cat", "red fish", "tree", "house")
N = 12


@pytest.fixture
def clip(tiny_clip) -> Clip:
    return Clip(tiny_clip, Preprocess((32, 32), (0.5,) * 3, (0.5,) * 3, "bicubic", "shortest"), ClipTokenizer(16))


@pytest.fixture
def pictures() -> list[Example]:
    pixels = np.random.default_rng(0).normal(size=(N, 3, 32, 32)).astype(np.float32)
    return [Example(f"{i}.png", pixels[i], ("a", "b", None)[i % 3]) for i in range(N)]


def sparse_sae(**fields):
    """A TopK SAE, of whose latents some never fire."""
    return random_sae(act="topk", k=3, **fields)


def described(clip: Clip, pictures: list[Example], **options) -> Catalogue:
    return describe(clip, POINT, sparse_sae(), pictures, WORDS, **{"n_top": 4, "n_steered": 2, **options})


def acts_and_embeds(clip: Clip, pictures: list[Example]) -> tuple[np.ndarray, np.ndarray]:
    pixels = torch.from_numpy(np.stack([picture.pixel_values for picture in pictures]))
    with torch.inference_mode():
        acts = sparse_sae().encode(clip.tower.resid(pixels, POINT))
        embeds = torch.nn.functional.normalize(clip.model.encode_image(pixels), dim=1)
    return acts.double().numpy(), embeds.double().numpy()


def test_monosemanticity_is_the_mean_over_all_pairs_of_pictures(clip, pictures) -> None:
    acts, embeds = acts_and_embeds(clip, pictures)
    largest = acts.max(1)
    got = described(clip, pictures).columns["monosemanticity"]
    for latent in range(D_SAE):
        a = largest[:, latent] - largest[:, latent].min()
        a = a / a.max() if a.any() else a
        pairs = [(a[n] * a[m], embeds[n] @ embeds[m]) for n in range(N) for m in range(n)]
        weight = sum(w for w, _ in pairs)
        if weight == 0:
            assert np.isnan(got[latent])
        else:
            assert got[latent] == pytest.approx(sum(w * cosine for w, cosine in pairs) / weight, abs=1e-5)
    assert np.isnan(got).any()
    assert not np.isnan(got).all()


def test_counts_are_those_of_the_activations(clip, pictures) -> None:
    acts, _ = acts_and_embeds(clip, pictures)
    found = described(clip, pictures)
    fires = acts > 0
    np.testing.assert_allclose(found.columns["frequency"], fires.mean((0, 1)), rtol=1e-6)
    with np.errstate(invalid="ignore"):
        mean = acts.sum((0, 1)) / fires.sum((0, 1))
    np.testing.assert_allclose(found.columns["mean_activation"], mean, rtol=1e-5)
    np.testing.assert_array_equal(found.histogram.sum(1), fires.sum((0, 1)))
    for latent in np.flatnonzero(fires.any((0, 1)))[:20]:
        values = acts[..., latent][fires[..., latent]]
        want = np.histogram(np.clip(values, BIN_EDGES[0], BIN_EDGES[-1] * 0.999), BIN_EDGES)[0]
        np.testing.assert_array_equal(found.histogram[latent], want)


def test_the_top_pictures_are_those_with_the_largest_activations(clip, pictures) -> None:
    largest = acts_and_embeds(clip, pictures)[0].max(1)  # [n, d_sae]
    found = described(clip, pictures)
    for latent in range(D_SAE):
        order = np.argsort(-largest[:, latent], kind="stable")[:4]
        want = [f"{n}.png" for n in order if largest[n, latent] > 0]
        assert [found.pictures[i] for i in found.top[latent] if i >= 0] == want
        np.testing.assert_allclose(found.top_activation[latent, : len(want)], largest[order[: len(want)], latent], 1e-5)
        assert not found.top_activation[latent, len(want) :].any()


def test_class_statistics_leave_out_pictures_without_a_class(clip, pictures) -> None:
    largest = acts_and_embeds(clip, pictures)[0].max(1)
    found = described(clip, pictures)
    by_class = np.stack([largest[first::3].sum(0) for first in (0, 1)])
    total = by_class.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = by_class / total
        entropy = -np.where(share > 0, share * np.log(share), 0).sum(0)
    np.testing.assert_allclose(found.columns["class_entropy"], np.where(total > 0, entropy, np.nan), atol=1e-5)
    np.testing.assert_array_equal(found.columns["n_classes"], (by_class > 0).sum(0))
    bare = described(clip, [picture._replace(label=None) for picture in pictures])
    assert not {"class_entropy", "n_classes"} & bare.columns.keys()


def test_batches_give_what_the_whole_gives(clip, pictures) -> None:
    whole, cut = described(clip, pictures), described(clip, pictures, batch=5)
    assert whole.columns.keys() == cut.columns.keys()
    for name, column in whole.columns.items():
        np.testing.assert_allclose(cut.columns[name], column, rtol=1e-4, atol=1e-6, err_msg=name)
    np.testing.assert_array_equal(cut.top, whole.top)
    np.testing.assert_array_equal(cut.histogram, whole.histogram)
    np.testing.assert_allclose(cut.directions, whole.directions, atol=2e-3)


def test_a_defense_on_the_host_is_bypassed(clip, pictures) -> None:
    plain = described(clip, pictures)
    wrap(clip.model, random_defense(clip.model, (0, random_sae(), LatentSet("a", tuple(range(60))))))
    defended = described(clip, pictures)
    for name, column in plain.columns.items():
        np.testing.assert_array_equal(defended.columns[name], column, err_msg=name)


def test_a_latent_that_never_fires_has_no_names_and_no_numbers(clip, pictures) -> None:
    found = described(clip, pictures)
    dead = found.columns["frequency"] == 0
    assert dead.any()
    assert not dead.all()
    for name in ("mean_activation", "monosemanticity", "steerability"):
        assert np.isnan(found.columns[name][dead]).all()
    assert not np.isnan(found.columns["steerability"][~dead]).any()
    assert all(not found.names[latent] for latent in np.flatnonzero(dead))
    assert not found.directions[dead].any()
    np.testing.assert_allclose(np.linalg.norm(found.directions[~dead].astype(float), axis=1), 1, atol=2e-3)


def test_further_columns_stand_beside_the_measured_ones(clip, pictures) -> None:
    contrast = np.arange(D_SAE, dtype=np.float64)
    np.testing.assert_array_equal(
        described(clip, pictures, columns={"contrast": contrast}).columns["contrast"], contrast
    )


@pytest.mark.parametrize(("options", "said"), [({"n_steered": 1}, "n_steered=1"), ({"n_top": 0}, "n_top=0")])
def test_numbers_that_mean_nothing_are_refused(clip, pictures, options, said) -> None:
    with pytest.raises(ConfigError, match=said):
        described(clip, pictures, **options)


def test_one_picture_is_too_few(clip, pictures) -> None:
    with pytest.raises(ConfigError, match="1 pictures can be read"):
        described(clip, pictures[:1])


# --- what a latent does -----------------------------------------------------------------------------------------------


class LinearClip:
    """A CLIP whose image embedding is the sum of the first d_embed entries of the tokens' residuals."""

    logit_scale = 1.0

    @property
    def tower(self) -> LinearClip:
        return self

    def positions(self, _hook_point: str, scope: str) -> slice:
        assert scope == "all"
        return slice(None)

    def embeds_from(self, resid: torch.Tensor, _hook_point: str) -> torch.Tensor:
        return resid[..., :5].sum(1)


def test_steerability_of_a_network_that_can_be_computed_by_hand() -> None:
    sae = random_sae(act="relu")
    resid = torch.randn(3, 4, sae.config.d_model, generator=torch.Generator().manual_seed(1))
    text_embeds, which = torch.eye(5), torch.zeros(D_SAE, dtype=torch.bool)
    which[[3, 50]] = True
    got = steerability(LinearClip(), POINT, resid, sae, text_embeds, which, steer=0.5)
    target = 0.5 * resid.norm(dim=-1).mean()
    for latent in (3, 50):
        moved = []
        for picture in resid:
            acts = sae.encode(picture)
            acts[:, latent] = target
            error = picture - sae.decode(sae.encode(picture), picture)
            steered = sae.decode(acts, picture) + error
            moved.append(steered[:, :5].sum(0).softmax(0) - picture[:, :5].sum(0).softmax(0))
        want = np.mean([float(a @ b) for i, a in enumerate(moved) for j, b in enumerate(moved) if i != j])
        assert got[latent] == pytest.approx(want, rel=1e-4)
    assert np.isnan(np.delete(got, [3, 50])).all()


def test_steering_that_does_the_same_to_all_pictures_has_the_published_value() -> None:
    sae = random_sae(act="relu")
    resid = torch.randn(1, 4, sae.config.d_model, generator=torch.Generator().manual_seed(1)).expand(4, -1, -1)
    which = torch.zeros(D_SAE, dtype=torch.bool)
    which[7] = True
    one_pair = steerability(LinearClip(), POINT, resid[:2], sae, torch.eye(5), which)[7]
    assert 0 < one_pair <= 2
    assert steerability(LinearClip(), POINT, resid, sae, torch.eye(5), which)[7] == pytest.approx(one_pair, rel=1e-4)


def test_the_jacobians_are_the_slopes_of_the_embedding(tiny_clip) -> None:
    tower = tower_of(tiny_clip)
    pixels = torch.from_numpy(np.random.default_rng(3).normal(size=(5, 3, 32, 32)).astype(np.float32))
    resid = tower.resid(pixels, POINT)
    to_cls, to_patch = mean_jacobians(tower, POINT, resid, batch=2)
    push = torch.randn(resid.shape[-1], generator=torch.Generator().manual_seed(2))
    for tokens, slope in ((slice(0, 1), to_cls @ push), (slice(1, None), to_patch @ push)):
        step = torch.zeros_like(resid)
        step[:, tokens] = 1e-2 * push
        with torch.no_grad():
            there, back = (tower.embeds_from(resid + sign * step, POINT) for sign in (1, -1))
            moved = (there - back).mean(0) / 2e-2
        n_tokens = len(range(resid.shape[1])[tokens])
        torch.testing.assert_close(slope * n_tokens, moved, rtol=0.02, atol=1e-4)


# --- names ------------------------------------------------------------------------------------------------------------


def unit_rows(n: int, width: int, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(n, width)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_planted_words_are_recovered_with_their_weights() -> None:
    words = unit_rows(200, 64, 0)
    rng = np.random.default_rng(1)
    planted = [rng.choice(200, 3, replace=False) for _ in range(40)]
    weights = np.sort(rng.uniform(0.5, 1.5, (40, 3)).astype(np.float32), axis=1)[:, ::-1]
    targets = np.stack([weight @ words[chosen] for chosen, weight in zip(planted, weights, strict=True)])
    index, weight = sparse_words(targets, words, 3)
    exact = [set(row) == set(chosen) for row, chosen in zip(index.tolist(), planted, strict=True)]
    assert np.mean(exact) > 0.9
    np.testing.assert_allclose(weight[exact], weights[exact], atol=1e-4)


def test_weights_are_positive_and_fall_and_nothing_has_no_words() -> None:
    words = unit_rows(50, 16, 0)
    targets = np.concatenate([unit_rows(30, 16, 5), np.zeros((1, 16), np.float32)])
    index, weight = sparse_words(targets, words, 4)
    assert ((weight > 0) == (index >= 0)).all()
    assert (np.diff(weight, axis=1) <= 0).all()
    assert (index[-1] == -1).all()
    assert (index[:-1, 0] >= 0).all()
    assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in index)


def test_one_word_is_named_by_itself() -> None:
    words = unit_rows(50, 16, 0)
    index, weight = sparse_words(2 * words[[7]], words, 3)
    assert index.tolist() == [[7, -1, -1]]
    assert weight[0, 0] == pytest.approx(2, abs=1e-4)


# --- on disk ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def found(clip, pictures) -> Catalogue:
    return described(clip, pictures)


def test_what_is_written_comes_back(found, tmp_path) -> None:
    other = replace(found, hook_point="blocks.0.hook_resid_post")
    read = catalogue.load(catalogue.save([found, other], tmp_path / "tiny.catalogue"))
    assert list(read) == [found.hook_point, other.hook_point]
    back = read[found.hook_point]
    assert back.columns.keys() == found.columns.keys()
    for name, column in found.columns.items():
        np.testing.assert_array_equal(back.columns[name], column, err_msg=name)
    for name in ("top", "histogram"):
        np.testing.assert_array_equal(getattr(back, name), getattr(found, name))
    np.testing.assert_allclose(back.top_activation, found.top_activation, rtol=1e-3)
    cosine = (back.directions.astype(float) * found.directions.astype(float)).sum(1)
    assert cosine[found.columns["frequency"] > 0].min() > 0.999
    assert (back.pictures, back.provenance) == (found.pictures, found.provenance)
    assert [[word for word, _ in names] for names in back.names] == [[w for w, _ in names] for names in found.names]


def test_a_flipped_byte_is_refused(found, tmp_path) -> None:
    folder = catalogue.save([found], tmp_path / "c")
    path = folder / "site-0.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"site-0\.safetensors"):
        catalogue.load(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda site: site["words"].clear(), "point at words"),
        (lambda site: site["pictures"].pop(), "point at words or pictures"),
        (lambda site: site.pop("columns"), "has the keys"),
        (lambda site: site["columns"].pop(), "does not have the values"),
        (lambda site: site["bin_edges"].pop(), "bin edges"),
    ],
    ids=["words", "pictures", "no columns", "a column less", "bins"],
)
def test_a_manifest_that_does_not_fit_its_numbers_is_refused(found, tmp_path, change, said) -> None:
    folder = catalogue.save([found], tmp_path / "c")
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest["sites"][0])
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=said):
        catalogue.load(folder)


def test_a_folder_of_something_else_is_left_alone(found, tmp_path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="is no catalogue"):
        catalogue.save([found], tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]


def test_a_catalogue_lies_beside_its_defense(found, tmp_path) -> None:
    (tmp_path / "mine").mkdir()
    assert catalogue.find(tmp_path / "mine") == {}
    catalogue.save([found], tmp_path / "mine.catalogue")
    assert list(catalogue.find(tmp_path / "mine")) == [POINT]
    assert catalogue.find("embedded:no-such-defense") == {}


def test_a_catalogue_is_found_from_within_its_defense(found, tmp_path, monkeypatch) -> None:
    (tmp_path / "mine").mkdir()
    catalogue.save([found], tmp_path / "mine.catalogue")
    monkeypatch.chdir(tmp_path / "mine")
    assert list(catalogue.find(".")) == [POINT]


def test_a_catalogue_knows_its_sae_also_with_thresholds(found) -> None:
    sae = sparse_sae()
    parameters = sae.parameters_numpy()
    site = Site(POINT, sae.config, parameters, (LatentSet("text", (3, 5)),))
    assert found.is_of(site)
    thresholds = {**parameters, "threshold": np.ones(D_SAE, np.float32)}
    calibrated = replace(site, sae_config=replace(sae.config, act="batchtopk", k=None), parameters=thresholds)
    assert found.is_of(calibrated)
    assert slim_site(calibrated).part is not None
    assert found.is_of(slim_site(calibrated))
    assert not found.is_of(replace(site, hook_point="blocks.0.hook_resid_post"))
    assert not found.is_of(replace(site, parameters={**parameters, "W_dec": parameters["W_enc"]}))


def test_a_latent_that_fires_alike_on_many_classes_has_no_name(found) -> None:
    latent = next(latent for latent, names in enumerate(found.names) if names)

    def named(entropy: float, n_classes: int) -> bool:
        columns = {"class_entropy": np.full(D_SAE, entropy), "n_classes": np.full(D_SAE, n_classes)}
        return bool(replace(found, columns=columns).names_of(latent))

    assert named(0.9 * np.log(50), 50)
    assert not named(0.99 * np.log(50), 50)
    assert named(np.nan, 50)
    assert named(np.log(2), 2), "of few classes it says little"
    assert replace(found, columns={}).names_of(latent) == found.names[latent]


def test_few_latents_of_the_embedded_text_defense_have_a_name() -> None:
    from defense.store.defenses import find_defense

    found = catalogue.find("embedded")
    is_named = []
    for site in find_defense("embedded").sites:
        table = found[site.hook_point]
        is_named += [bool(table.names_of(latent)) for each in site.sets for latent in each.latents]
        assert sum(bool(table.names_of(latent)) for latent in range(table.d_sae)) > 0.8 * table.d_sae
    assert sum(is_named) < 0.2 * len(is_named), "they fire wherever letters stand"


def test_parts_of_different_length_are_refused(found) -> None:
    with pytest.raises(ShapeError, match="one row per latent"):
        replace(found, top=found.top[:-1])


# --- use --------------------------------------------------------------------------------------------------------------


def test_search_finds_the_latent_that_pushes_to_the_phrase(found) -> None:
    alive = np.flatnonzero(found.columns["frequency"] > 0)
    aim = found.directions[alive[3]].astype(np.float32)
    best = catalogue.search(found, aim, 5)
    assert best[0][0] == alive[3]
    assert [score for _, score in best] == sorted((score for _, score in best), reverse=True)
    assert {latent for latent, _ in catalogue.search(found, aim, 10**6)} == set(alive)
    with pytest.raises(ShapeError, match="32 entries, not 7"):
        catalogue.search(found, np.ones(7))


def test_a_map_shows_where_the_latent_fires(clip) -> None:
    image = Image.fromarray(np.random.default_rng(2).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    pixels = torch.from_numpy(clip.preprocess(image))[None]
    acts = sparse_sae().encode(clip.tower.resid(pixels, POINT))[0, 1:]
    latent = int(acts.amax(0).argmax())
    got = clip.latent_map(POINT, sparse_sae(), latent, image)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, acts[:, latent].reshape(4, 4).numpy(), atol=1e-5)
    with pytest.raises(ConfigError, match="no latent 160"):
        clip.latent_map(POINT, sparse_sae(), D_SAE, image)


def test_pictures_of_a_folder_are_found_again_by_key_and_broken_ones_are_named(clip, tmp_path) -> None:
    for name, gray in (("x/dark.png", 10), ("y/light.png", 240)):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (40, 40), (gray,) * 3).save(tmp_path / name)
    (tmp_path / "y" / "broken.png").write_bytes(b"no picture")
    broken: list[str] = []
    seen = list(examples(clip, open_pictures([tmp_path]), broken.append))
    assert [(example.key, example.label) for example in seen] == [("x/dark.png", "x"), ("y/light.png", "y")]
    assert broken == ["y/broken.png"]
    assert catalogue.picture("x/dark.png", tmp_path).getpixel((0, 0)) == (10, 10, 10)


def test_the_classes_of_a_tar_file_are_read(clip, tmp_path) -> None:
    import io
    import tarfile

    png = io.BytesIO()
    Image.new("RGB", (40, 40)).save(png, "PNG")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (("0.png", png.getvalue()), ("0.cls", b"7\n")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    (example,) = examples(clip, open_pictures([tmp_path / "a.tar"]))
    assert (example.key, example.label) == ("a.tar:0.png", "7")


@pytest.mark.parametrize("key", ["../secret.png", "missing.png", "/etc/hostname"])
def test_a_key_leads_nowhere_but_into_the_folder(key, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    with pytest.raises(ConfigError, match="is no file in"):
        catalogue.picture(key, tmp_path / "in")
    with pytest.raises(ConfigError, match="give the folder"):
        catalogue.picture(key)


def test_scenes_are_drawn_again_from_their_key() -> None:
    from defense.world import draws, scenes

    drawn = draws.web_scenes(9, 51)
    for index in (0, 3, 8):
        again = catalogue.picture(f"scene:51:{index}")
        np.testing.assert_array_equal(np.asarray(again), np.asarray(scenes.render(drawn[index])))
    for task, seed in {"waterbirds": 53, "celeba": 54}.items():
        drawn = [case.scene for case in draws.GROUPINGS[task].draw(4, seed)]
        again = catalogue.picture(f"scene:{seed}:3")
        np.testing.assert_array_equal(np.asarray(again), np.asarray(scenes.render(drawn[3])))
    with pytest.raises(ConfigError, match="names no scene"):
        catalogue.picture("scene:../1:2")


# --- what ships -------------------------------------------------------------------------------------------------------


def shipped() -> list[str]:
    from defense.hosts.clip import embedded_folder

    folder = embedded_folder("catalogue")
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


@pytest.mark.parametrize("name", shipped())
def test_a_catalogue_that_ships_belongs_to_the_defense_that_ships(name) -> None:
    from defense.hosts.clip import embedded_folder
    from defense.store import defenses

    found = catalogue.find(f"embedded:{name}")
    sites = {site.hook_point: site for site in defenses.load(embedded_folder(name)).sites}
    assert found.keys() == sites.keys()
    for point, each in found.items():
        assert each.is_of(sites[point]), "describe it again"
    assert sum(path.stat().st_size for path in (embedded_folder("catalogue") / name).iterdir()) < 2 * 2**20


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_writes_a_catalogue_and_names_broken_pictures(tiny_folder, tmp_path) -> None:
    from typer.testing import CliRunner

    from defense.cli import app
    from defense.store import checkpoint
    from defense.store.checkpoint import Checkpoint

    (tmp_path / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for index in range(4):
        pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{index}.png")
    (tmp_path / "words.txt").write_text("\n".join(WORDS))
    checkpoint.save(Checkpoint(sparse_sae(), POINT), tmp_path / "sae")
    arguments = ["describe", tmp_path / "sae", "--pictures", tmp_path / "pictures", "--words", tmp_path / "words.txt"]
    arguments += ["--out", tmp_path / "out", "--model", f"local-dir:{tiny_folder}", "--n-steered", 2]
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    assert f"of {D_SAE} latents fire, on 4 pictures" in done.stdout
    found = catalogue.load(tmp_path / "out")[POINT]
    assert set(found.pictures) <= {f"{index}.png" for index in range(4)}
    assert {word for names in found.names for word, _ in names} <= set(WORDS)
    (tmp_path / "pictures" / "4.png").write_bytes(b"")
    again = CliRunner().invoke(app, list(map(str, arguments)))
    assert again.exit_code == 4
    assert catalogue.load(tmp_path / "out")[POINT].provenance["n_pictures"] == 4
    (tmp_path / "out" / "mine.txt").write_text("")
    assert CliRunner().invoke(app, list(map(str, arguments))).exit_code == 2
