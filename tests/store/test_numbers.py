"""55, 57, 60 and 61: numbers that are none, tensors that make no SAE, latents and gains that mean nothing."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from defense.core.latents import LatentSet
from defense.errors import CheckpointError, ConfigError, DefenseError, NonFiniteError, ShapeError
from defense.hosts.defense import Defense
from defense.store.defenses import MANIFEST, load, save

from .defense_folders import (
    D_MODEL,
    D_SAE,
    GOLDEN,
    SITE_0,
    check_refused,
    edit_manifest,
    everything_below,
    rewrite_tensors,
)

# --- 55: numbers that are not finite ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        (SITE_0, "W_enc"),
        (SITE_0, "b_enc"),
        (SITE_0, "W_dec"),
        (SITE_0, "b_dec"),
        (SITE_0, "threshold"),
        (GOLDEN, "plain"),
    ],
)
def test_fault_55_a_number_that_is_not_finite_is_refused_at_load(
    folder: Path, name: str, tensor: str, value: float
) -> None:
    rewrite_tensors(folder, name, lambda tensors: tensors[tensor].flat.__setitem__(-1, value))
    for verify in ("sha256", "size"):
        check_refused(folder, name, tensor, "NaN or infinity", verify=verify, error=NonFiniteError)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39], ids=str)
def test_fault_55_a_number_that_is_not_finite_is_not_written_either(
    defense: Defense, folder: Path, value: float
) -> None:
    before = everything_below(folder.parent)
    parameters = {**defense.sites[0].parameters, "b_dec": np.full(D_MODEL, value)}
    with pytest.raises(NonFiniteError, match="b_dec"):
        save(replace(defense, sites=(replace(defense.sites[0], parameters=parameters),)), folder)
    assert everything_below(folder.parent) == before


def test_fault_55_weights_too_large_for_float16_are_refused(defense: Defense, tmp_path: Path) -> None:
    parameters = {**defense.sites[0].parameters, "b_dec": np.full(D_MODEL, 7e4, np.float32)}
    large = replace(defense, sites=(replace(defense.sites[0], parameters=parameters),))
    with pytest.raises(NonFiniteError, match="b_dec"):
        save(large, tmp_path / "half", dtype=np.float16)
    assert list(tmp_path.iterdir()) == []
    load(save(large, tmp_path / "full"))


# --- 57, 60, 61: what the numbers mean --------------------------------------------------------------------------------


def _transpose_encoder(tensors: dict[str, np.ndarray]) -> None:
    tensors["W_enc"] = np.ascontiguousarray(tensors["W_enc"].T)


def _drop_b_dec(tensors: dict[str, np.ndarray]) -> None:
    del tensors["b_dec"]


def _zero_decoder_row(tensors: dict[str, np.ndarray]) -> None:
    tensors["W_dec"][4] = 0


def _extra_tensor(tensors: dict[str, np.ndarray]) -> None:
    tensors["r_mag"] = np.ones(D_SAE, np.float32)


def _integers(tensors: dict[str, np.ndarray]) -> None:
    tensors["W_dec"] = tensors["W_dec"].astype(np.int32)


def _complex(tensors: dict[str, np.ndarray]) -> None:
    tensors["W_dec"] = tensors["W_dec"].astype(np.complex64) * np.nan


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (_transpose_encoder, ShapeError, r"W_enc is \[10, 6\]; its config says \[6, 10\]"),
        (_drop_b_dec, CheckpointError, r"missing \['b_dec'\]"),
        (_zero_decoder_row, CheckpointError, "decoder row 4 is zero"),
        (_extra_tensor, CheckpointError, r"unknown \['r_mag'\]"),
        (_integers, CheckpointError, "W_dec has dtype int32"),
        (_complex, CheckpointError, "W_dec has dtype complex64"),
    ],
)
def test_fault_57_tensors_that_do_not_make_an_sae_are_refused(
    folder: Path, edit: Callable[[dict[str, np.ndarray]], None], error: type[DefenseError], message: str
) -> None:
    pytest.importorskip("torch")
    from defense.core.sae import SparseAutoencoder

    def build() -> None:
        site = load(folder).sites[0]
        SparseAutoencoder(site.sae_config, dict(site.parameters))

    build()
    rewrite_tensors(folder, SITE_0, edit)
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize("latent", [-1, D_SAE, 10**6])
def test_fault_60_a_latent_that_the_sae_does_not_have_is_refused(folder: Path, latent: int) -> None:
    pytest.importorskip("torch")
    from defense.core.sae import SparseAutoencoder
    from defense.core.suppress import Suppressor

    edit_manifest(folder, lambda manifest: manifest["sites"][0]["sets"][0]["latents"].__setitem__(0, latent))
    site = load(folder).sites[0]
    sae = SparseAutoencoder(site.sae_config, dict(site.parameters))
    with pytest.raises(ConfigError, match=f"names latent {latent}; this SAE has latents 0 to {D_SAE - 1}"):
        Suppressor(sae, site.sets[0])


def test_fault_60_a_latent_twice_on_disk_counts_once(folder: Path) -> None:
    edit_manifest(folder, lambda manifest: manifest["sites"][0]["sets"][0].update(latents=[3, 3]))
    latent_set = load(folder).sites[0].sets[0]
    assert (latent_set.latents, latent_set.gains, latent_set.scores) == ((3,), (0.0,), {"effect": (0.5,)})


def test_fault_60_an_empty_set_survives_its_round_trip(defense: Defense, tmp_path: Path) -> None:
    empty = replace(defense, sites=(replace(defense.sites[0], sets=(LatentSet("text", ()),)),))
    assert load(save(empty, tmp_path / "text")).sites[0].sets[0].latents == ()


@pytest.mark.parametrize("gain", [0, 0.5, 1])
def test_fault_61_gains_from_0_to_1_load(folder: Path, gain: float) -> None:
    edit_manifest(folder, lambda manifest: manifest["sites"][0]["sets"][0]["gains"].__setitem__(0, gain))
    assert load(folder).sites[0].sets[0].gains == (gain, 0.25)


@pytest.mark.parametrize("gain", ["2", "-1", "NaN", "1e999", "true", "null", '"0"'])
def test_fault_61_other_gains_on_disk_are_refused(folder: Path, gain: str) -> None:
    edit_manifest(folder, lambda manifest: manifest["sites"][0]["sets"][0]["gains"].__setitem__(0, "GAIN"))
    text = (folder / MANIFEST).read_text(encoding="utf-8")
    (folder / MANIFEST).write_text(text.replace('"GAIN"', gain), encoding="utf-8")
    check_refused(folder, MANIFEST)


def test_fault_61_unsafe_on_disk_is_refused(folder: Path) -> None:
    edit_manifest(folder, lambda manifest: manifest["sites"][0]["sets"][0].update(gains=[2, -1], unsafe=True))
    check_refused(folder, MANIFEST, "unsafe=True", "bring them into [0, 1]")
