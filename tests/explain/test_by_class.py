"""The latents of a class and the masking curve, on a network in which the latents that decide were planted."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("open_clip")
import torch

from defense.core.config import SAEConfig
from defense.core.sae import SparseAutoencoder
from defense.errors import ConfigError
from defense.explain import catalogue
from defense.explain.by_class import WAYS, ClassSums, lines_of, masking_curve
from defense.explain.sums import Example

from ..command import run
from ..conftest import clip_of
from .described import POINT, described
from .planted import PlantedClip

CLASSES = ("ant", "bee", "cow", "dog", "eel")
WIDTH, ALWAYS, NEVER = 12, 9, 11
CPU = torch.device("cpu")


def sae() -> SparseAutoencoder:
    """Each channel is a latent."""
    eye = np.eye(WIDTH, dtype=np.float32)
    parameters = {"W_enc": eye, "b_enc": np.zeros(WIDTH), "W_dec": eye, "b_dec": np.zeros(WIDTH)}
    return SparseAutoencoder(SAEConfig(WIDTH, WIDTH, "relu"), parameters)


def planted(n: int = 200, n_masked: int = 64) -> tuple[ClassSums, torch.Tensor]:
    """Pictures of three tokens on which the channel of their class is up, and channel ALWAYS more on all of them."""
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(n) % 5
    resid = 0.1 * torch.rand(n, 3, WIDTH, generator=generator)
    resid[..., NEVER] = 0
    resid[..., ALWAYS] += 5
    resid[torch.arange(n), :, label] += 1
    sums = ClassSums(CLASSES, WIDTH, CPU, 0, n_masked)
    for first in range(0, n, 30):
        part = slice(first, first + 30)
        chunk = [Example(str(i), np.zeros(0), CLASSES[number]) for i, number in enumerate(label[part].tolist())]
        sums.add(chunk, sae().encode(resid[part]).amax(1), resid[part])
    return sums, label


def test_the_latent_that_was_planted_leads_its_class_and_what_always_fires_leads_none():
    top = planted()[0].top(3)
    assert [top[name][0][0] for name in CLASSES] == [0, 1, 2, 3, 4]
    assert all(top[name][0][1] > 0.5 for name in CLASSES)
    assert all(lead < 0.1 for name in CLASSES for _, lead in top[name][1:])
    assert all(latent != NEVER for name in CLASSES for latent, _ in top[name])


def test_one_latent_carries_the_decision_and_the_controls_do_not():
    curve = masking_curve(PlantedClip(), POINT, sae(), planted()[0], torch.eye(5), 0)
    assert curve["n"] == 50
    assert curve["plain"][0] == 1
    assert curve["ks"] == [1, 2, 5, 10, WIDTH - 1], "all that fire, and those below"
    share = {way: [figures[0] for figures in curve["ways"][way]] for way in WAYS}
    assert max(share["remove the class's"]) == 0
    assert min(share["keep only the class's"]) == 1
    assert share["remove the most active"][0] == 1, "what always fires decides nothing"
    for way in WAYS[2:]:
        assert share[way][-1] < 1, "with all of them gone nothing is left to decide by"


def test_what_the_sae_does_not_code_stays_whatever_is_masked():
    """Without latents of the channels that decide, these are the SAE's error."""
    blind = sae()
    for tensor in (blind.W_enc, blind.W_dec):
        tensor[:5] = 0
        tensor[:, :5] = 0
    curve = masking_curve(PlantedClip(), POINT, blind, planted()[0], torch.eye(5), 0)
    assert {figures[0] for way in WAYS for figures in curve["ways"][way]} == {1}


def test_pictures_that_are_masked_are_not_the_ones_that_ranked():
    sums, label = planted(40, n_masked=100)
    assert int(sums.n.sum()) == 30
    assert torch.stack(sums.label.kept).tolist() == label[3::4].tolist()
    seen = torch.stack(sums.resid.kept)
    assert seen[:, 0, :5].argmax(1).tolist() == label[3::4].tolist(), "residuals and labels stay together"


def test_as_many_pictures_are_kept_as_asked_and_no_more_and_both_of_the_same():
    sums, _ = planted(400, n_masked=7)
    kept = torch.stack(sums.resid.kept)
    assert len(kept) == 7
    assert kept[:, 0, :5].argmax(1).tolist() == torch.stack(sums.label.kept).tolist()


def test_pictures_without_a_class_do_not_count_and_without_any_there_is_nothing_to_mask():
    sums = ClassSums(CLASSES, WIDTH, CPU, 0)
    chunk = [Example("a", np.zeros(0), None), Example("b", np.zeros(0), "zebra")]
    sums.add(chunk * 4, torch.ones(8, WIDTH), torch.ones(8, 3, WIDTH))
    assert not sums.n.any()
    assert not sums.top(3)["ant"]
    with pytest.raises(ConfigError, match="one of the 5 classes"):
        masking_curve(PlantedClip(), POINT, sae(), sums, torch.eye(5), 0)
    with pytest.raises(ConfigError, match="at least two"):
        ClassSums(("ant",), WIDTH, CPU, 0)


def test_masking_nothing_that_fires_changes_nothing_and_everything_is_the_sae_without_latents(tiny_clip, pictures):
    clip = clip_of(tiny_clip)
    found = described(clip, [p._replace(label=("a", "b")[i % 2]) for i, p in enumerate(pictures)], classes=("a", "b"))
    of_classes = found.provenance["classes"]
    curve = of_classes["masking"]
    keep, remove = (curve["ways"][way] for way in ("keep only the class's", "remove the class's"))
    assert keep[-1] == curve["plain"], "all that fire are kept"
    assert curve["n"] == 3
    assert of_classes["n_ranked"] == 9
    assert len(remove) == len(curve["ks"])
    lines = lines_of(of_classes)
    assert lines[0].startswith("a: ")
    assert any(line.startswith("remove random ones") for line in lines)
    many = lines_of({**of_classes, "top": {str(number): [] for number in range(33)}})
    assert "and 13 more classes, in the catalogue" in many
    assert len(many) == len(lines) - 2 + 20 + 1


def test_the_command_takes_classes_by_name_and_refuses_others_before_the_work(describing, tmp_path, monkeypatch):
    code, out, err = run(*describing, "--classes", tmp_path / "classes.txt")
    assert code == 0, err
    assert "keep only the class's" in out
    found = catalogue.load(tmp_path / "out")[POINT].provenance["classes"]
    assert list(found["top"]) == ["dog", "cat"]
    assert found["masking"]["n"] == 2
    (tmp_path / "classes.txt").write_text("dog\nfox\nowl\n")
    monkeypatch.setattr("defense.hosts.clip.load_clip", lambda *_args, **_fields: pytest.fail("loaded"))
    code, _, err = run(*describing, "--classes", tmp_path / "classes.txt")
    assert code == 2
    assert "'cat'" in err
