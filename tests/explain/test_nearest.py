"""The pictures nearest by latents and by the embedding, where it is known which they are."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("open_clip")
import torch
from PIL import Image

from defense.classify.classifier import RobustClassifier
from defense.core.config import SAEConfig
from defense.core.sae import SparseAutoencoder
from defense.data.sources import open_pictures
from defense.errors import ConfigError
from defense.explain.nearest import N_NEAREST, Nearest, Neighbor, nearest, overlaps
from defense.explain.report_html import report_html
from defense.explain.report_png import report_png
from defense.hosts.attach import detach, is_wrapped

from ..command import run
from ..conftest import D_MODEL, random_defense
from .explained import BLOCK, LABELS, a_set
from .pages import Page, picture

SIDE, MARK = 32, 8
MARKED, COPIES = ("m0.png", "m1.png", "m2.png"), ("c0.png", "c1.png", "c2.png")


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def marked(pixels: np.ndarray) -> np.ndarray:
    """The same with its first patch white."""
    pixels = pixels.copy()
    pixels[:MARK, :MARK] = 255
    return pixels


@pytest.fixture
def folder(tmp_path):
    """Other noise with the mark of the query, and nearly the query's noise without it."""
    root = tmp_path / "pictures"
    root.mkdir()
    for index, (mark, copy) in enumerate(zip(MARKED, COPIES, strict=True)):
        Image.fromarray(marked(noise(10 + index))).save(root / mark)
        close = noise(0).astype(int) + np.random.default_rng(index).integers(-9, 10, (SIDE, SIDE, 3))
        Image.fromarray(close.clip(0, 255).astype(np.uint8)).save(root / copy)
    return root


@pytest.fixture
def clf(clip):
    """A defense whose latent 0 fires on a white first patch alone, and whose latent 1 never fires."""
    if is_wrapped(clip.model):
        detach(clip.model)

    def first(pixels: np.ndarray) -> torch.Tensor:
        x = torch.from_numpy(clip.preprocess(Image.fromarray(pixels))[None])
        return clip.tower.resid(x, BLOCK)[0, clip.tower.n_prefix :]

    with torch.inference_mode():
        on = torch.stack([first(marked(noise(seed)))[0] for seed in range(50, 60)])
        off = torch.cat([first(noise(seed)) for seed in range(50, 60)] + [first(marked(noise(60)))[1:]])
        pooled = torch.cat([on - on.mean(0), off - off.mean(0)])
        within = pooled.T @ pooled / len(pooled) + 1e-3 * torch.eye(D_MODEL)
        row = torch.linalg.solve(within, on.mean(0) - off.mean(0))
        bias = -((on @ row).min() + (off @ row).max()) / 2
    W_enc = torch.zeros(D_MODEL, 2)
    W_enc[:, 0] = row
    parameters = {
        "W_enc": W_enc, "b_enc": torch.stack([bias, torch.tensor(-1.0)]), "W_dec": 0.01 * torch.ones(2, D_MODEL),
        "b_dec": torch.zeros(D_MODEL),
    }  # fmt: skip
    arrays = {name: each.numpy().astype(np.float32) for name, each in parameters.items()}
    sae = SparseAutoencoder(SAEConfig(D_MODEL, 2, "relu"), arrays)
    yield RobustClassifier(clip, random_defense(clip.model, (1, sae, a_set(range(2))))).set_labels(LABELS)
    detach(clip.model)


def names(side) -> list[str]:
    return [each.name for each in side]


@pytest.mark.parametrize("latents", [[(BLOCK, 0)], [(BLOCK, 0), (BLOCK, 1)], []], ids=["one", "two", "strongest"])
def test_by_the_planted_latent_marked_pictures_are_nearest_and_by_the_embedding_copies(clf, folder, latents):
    found = nearest(clf, Image.fromarray(marked(noise(0))), open_pictures([folder]), latents, n=3)
    assert set(names(found.by_latents)) == set(MARKED)
    assert set(names(found.by_embedding)) == set(COPIES)
    assert found.n_shared == 0
    assert found.latents == (tuple(latents) or ((BLOCK, 0),))
    assert (found.n_pictures, found.n_same, found.n_unreadable) == (6, 0, 0)
    for side in (found.by_latents, found.by_embedding):
        scores = [each.score for each in side]
        assert scores == sorted(scores, reverse=True)
        assert all(0 < score <= 1 for score in scores)


def test_pictures_without_the_latent_are_not_near_and_all_others_are_counted(clf, folder):
    (folder / "bad.png").write_bytes(b"no picture")
    Image.fromarray(marked(noise(0))).save(folder / "itself.png")
    found = nearest(clf, Image.fromarray(marked(noise(0))), open_pictures([folder]))
    assert set(names(found.by_latents)) == set(MARKED), "of six pictures three have no overlap"
    assert len(found.by_embedding) == N_NEAREST
    assert (found.n_pictures, found.n_same, found.n_unreadable) == (6, 1, 1)


def test_overlap_is_that_of_the_formula():
    acts = np.array([[2.0, 0, 4], [0, 0, 0], [1, 3, 0], [4, 0, 8]])
    assert overlaps(acts, np.array([2.0, 0, 4])).tolist() == [1.0, 0.0, 1 / 9, 0.5]


def test_the_plain_network_is_read_whatever_the_defense_does(clf, folder):
    image = Image.fromarray(marked(noise(0)))
    want = nearest(clf, image, open_pictures([folder]))
    with clf.clip.undefended():
        assert nearest(clf, image, open_pictures([folder])).to_dict() == want.to_dict()


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        ([(BLOCK, 1)], "none fires on it"),
        ([(BLOCK, 2)], "there is no latent 2"),
        ([("blocks.0.hook_resid_post", 0)], "no defense at 'blocks.0"),
    ],
)
def test_latents_by_which_nothing_is_near_are_refused_before_a_picture_is_read(
    clf, folder, monkeypatch, latents, message
):
    from defense.explain import nearest as module

    monkeypatch.setattr(module, "_batches", lambda *_: pytest.fail("read"))
    with pytest.raises(ConfigError, match=message):
        nearest(clf, Image.fromarray(marked(noise(0))), open_pictures([folder]), latents)


def test_nothing_to_compare_with_is_an_error(clf, tmp_path):
    (tmp_path / "only").mkdir()
    Image.fromarray(marked(noise(0))).save(tmp_path / "only" / "itself.png")
    (tmp_path / "only" / "bad.png").write_bytes(b"no picture")
    with pytest.raises(ConfigError, match="1 cannot be read, 1 are this one itself"):
        nearest(clf, Image.fromarray(marked(noise(0))), open_pictures([tmp_path / "only"]))
    with pytest.raises(ConfigError, match="no latent of the defense fires on this picture"):
        nearest(clf, Image.fromarray(noise(0)), open_pictures([tmp_path / "only"]))


# --- reports ----------------------------------------------------------------------------------------------------------


def test_reports_show_the_pictures_with_their_names_escaped(clf):
    near = Neighbor("<b>&.png", 0.5, picture(20, 10))
    found = Nearest(((BLOCK, 0),), (near,), (near, near), 1234, 0, 0)
    explanation = clf.explain(picture())
    bare, page = (Page(report_html(picture(), explanation, nearest=each)) for each in (None, found))
    assert len(page.all("img")) == len(bare.all("img")) + 3
    assert "0.50 <b>&.png" in page.text
    assert "Of the 1 nearest, 1 are among the nearest by the whole embedding, too." in page.text
    assert "among 1,234 pictures" in page.text
    bare, drawn = (report_png(picture(), explanation, nearest=each) for each in (None, found))
    assert drawn.height > bare.height + 200
    nothing = Nearest(((BLOCK, 0),), (), (near,), 3, 0, 0)
    assert "On none of these does it fire." in Page(report_html(picture(), explanation, nearest=nothing)).text
    report_png(picture(), explanation, nearest=nothing)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(defense_folder, tmp_path):
    picture(60, 40).save(tmp_path / "apple.png")
    return ("explain", tmp_path / "apple.png", "--defense", defense_folder, "--labels", "dog,cat,red fish")


def test_the_command_writes_both_lists_and_counts_what_cannot_be_read(asked, folder, tmp_path):
    (folder / "bad.png").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("no picture")
    code, _, err = run(*asked, "--nearest", folder, "--out", tmp_path / "r.json")
    assert code == 4, err
    assert "1 pictures could not be read" in err
    assert "passed over" in err
    found = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["nearest"]
    assert (found["n_pictures"], found["n_unreadable"]) == (6, 1)
    assert len(found["by_embedding"]) == N_NEAREST
    (point, latent), *_ = found["latents"]
    (folder / "bad.png").unlink()
    for text in (str(latent), f"{point}:{latent}"):
        assert run(*asked, "--nearest", folder, "--latent", text, "--out", tmp_path / "r.html")[0] == 0
        assert f"By the latent {latent} at {point}" in Page((tmp_path / "r.html").read_text(encoding="utf-8")).text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--latent", "3"], "--nearest"),
        (["--nearest", "{tmp}/nowhere"], "nowhere"),
        (["--nearest", "{tmp}/empty"], "empty"),
        (["--nearest", "{tmp}/pictures", "--latent", "x"], "want a number"),
        (["--nearest", "{tmp}/pictures", "--latent", "blocks.0.hook_resid_post:3"], "want a number"),
        (["--nearest", "{tmp}/pictures", "--latent", "99999"], "there is no latent 99999"),
    ],
    ids=["no-folder", "not-there", "empty", "no-number", "no-such-block", "no-such-latent"],
)
@pytest.mark.usefixtures("folder")
def test_what_cannot_be_compared_is_a_usage_error_and_writes_nothing(asked, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    code, _, err = run(*asked, "--out", tmp_path / "r.json", *(each.format(tmp=tmp_path) for each in arguments))
    assert code == 2, err
    assert message in " ".join(err.replace("\u2502", " ").split())
    assert not (tmp_path / "r.json").exists()


def test_a_number_alone_is_not_enough_where_there_are_several_blocks():
    import typer

    from defense.cli.explain import _key_of

    assert _key_of("b:2:7", ["b:2", "b:3"]) == ("b:2", 7)
    with pytest.raises(typer.BadParameter, match="latents at b:2, b:3; say which, as in b:2:7"):
        _key_of("7", ["b:2", "b:3"])
