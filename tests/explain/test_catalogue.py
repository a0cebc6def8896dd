"""Catalogues on disk and in use, those that ship, and the command that writes one."""

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
from defense.data.sources import open_pictures
from defense.errors import CheckpointError, ConfigError, IntegrityError, ShapeError
from defense.explain import catalogue
from defense.explain.catalogue import MANIFEST, Catalogue
from defense.explain.describe import examples
from defense.hosts.clip import Clip
from defense.hosts.defense import Site
from defense.hosts.slim import slim_site

from ..conftest import D_SAE, clip_of
from .described import POINT, WORDS, described, sparse_sae


@pytest.fixture
def clip(tiny_clip) -> Clip:
    return clip_of(tiny_clip)


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
