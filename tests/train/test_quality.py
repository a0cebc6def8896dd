"""What a training came to: the cost of splicing an SAE in, accuracy, the checkpoint on disk."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest

pytest.importorskip("open_clip")
import torch

from defense.core.config import SAEConfig
from defense.core.sae import SparseAutoencoder
from defense.data.sources import open_pictures
from defense.store import checkpoint
from defense.train.quality import evaluate, spliced
from defense.train.runs import train_checkpoint

from .planted import NAMES, POINT, SHORT, stream_of


def identity_sae(d_model: int) -> SparseAutoencoder:
    """An SAE that reconstructs everything: each direction and its opposite is a latent."""
    both = np.concatenate([np.eye(d_model), -np.eye(d_model)]).astype(np.float32)
    parameters = {"W_enc": both.T, "b_enc": np.zeros(2 * d_model), "W_dec": both, "b_dec": np.zeros(d_model)}
    return SparseAutoencoder(SAEConfig(d_model, 2 * d_model, "relu"), parameters)


def blind_sae(d_model: int) -> SparseAutoencoder:
    """An SAE that says the same of everything."""
    sae = identity_sae(d_model)
    sae.folded_bias -= 1e6
    return sae


def test_splicing_in_a_perfect_sae_changes_nothing(clip, folder):
    pixel_values = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = clip.model.encode_image(pixel_values)
        with spliced(clip, POINT, identity_sae(64)):
            edited = clip.model.encode_image(pixel_values)
        after = clip.model.encode_image(pixel_values)
    torch.testing.assert_close(edited, plain, atol=1e-5, rtol=1e-5)
    assert torch.equal(after, plain)
    quality, zero_shot = evaluate(clip, POINT, identity_sae(64), open_pictures([folder]), names=NAMES)
    assert quality.explained_variance > 0.9999
    assert zero_shot.agreement == 1.0
    assert zero_shot.spliced == zero_shot.plain


def test_splicing_in_a_blind_sae_makes_all_pictures_alike(clip, folder):
    pictures = open_pictures([folder])
    with torch.no_grad(), spliced(clip, POINT, blind_sae(64)):
        first, second = (clip.model.encode_image(torch.randn(1, 3, 32, 32)) for _ in range(2))
    torch.testing.assert_close(first, second)
    quality, zero_shot = evaluate(clip, POINT, blind_sae(64), pictures, names=NAMES)
    assert quality.explained_variance < 0.1
    assert quality.alive == 0
    assert zero_shot.n == len(list(pictures.held_out(1000)))


def test_accuracy_is_that_of_the_labels(clip, folder, tmp_path):
    """With the answers of the CLIP itself as labels, the CLIP is always right."""
    from defense.classify.classifier import RobustClassifier

    clf = RobustClassifier(clip).set_labels(NAMES)
    for i, path in enumerate(sorted(folder.rglob("*.png"))):
        answer = str(clf.predict([path])[0])
        (tmp_path / answer).mkdir(exist_ok=True)
        (tmp_path / answer / f"{i:03d}.png").write_bytes(path.read_bytes())
    _, zero_shot = evaluate(clip, POINT, identity_sae(64), open_pictures([tmp_path]), names=NAMES)
    assert zero_shot.plain == 1.0


def test_without_labels_there_is_no_accuracy(clip, folder):
    assert evaluate(clip, POINT, identity_sae(64), open_pictures([folder]))[1] is None
    assert evaluate(clip, POINT, identity_sae(64), open_pictures([folder / "ant"]), names=NAMES)[1] is None


def test_a_training_becomes_an_sae_on_disk(clip, tiny_folder, folder, tmp_path):
    stream = stream_of(clip, folder)
    spec = clip.id_as(f"local-dir:{tiny_folder}")
    trained = train_checkpoint(stream, SHORT, spec, names=NAMES, shards=tmp_path / "shards", license="MIT")
    checkpoint.save(trained, tmp_path / "sae")
    read = checkpoint.load(tmp_path / "sae")
    assert torch.equal(read.sae.W_enc, trained.sae.W_enc)
    assert (read.hook_point, read.license, read.quick_gelu) == (POINT, "MIT", False)
    assert read.sae.config.tokens == "all"
    assert read.provenance["host"]["sha256"] == spec.sha256
    assert read.provenance["train"] == asdict(SHORT)
    assert read.provenance["activations"]["n_shards"] == 3
    assert read.provenance["quality"]["l0"] > 0
    assert read.provenance["zero_shot"]["n"] == 2
    again = train_checkpoint(stream_of(clip, folder), SHORT, spec, shards=tmp_path / "shards")
    assert torch.equal(again.sae.W_enc, trained.sae.W_enc), "the shards that are there must be used"
