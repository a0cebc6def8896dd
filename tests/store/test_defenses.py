"""A defense on disk: what is written comes back, and nothing else is ever accepted."""

import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from defense.core.latents import LatentSet
from defense.errors import ConfigError, IntegrityError
from defense.hosts.defense import Defense, join
from defense.store.defenses import MANIFEST, load, save
from defense.store.folders import sha256_of

from .defense_folders import GOLDEN, SITE_0, are_equal, edit_manifest, everything_below, flip_byte, random_site

# --- what is written comes back ---------------------------------------------------------------------------------------


def test_a_defense_survives_its_round_trip(defense: Defense, folder: Path) -> None:
    loaded = load(folder)
    assert are_equal(loaded, defense)
    for loaded_site, site in zip(loaded.sites, defense.sites, strict=True):
        assert replace(loaded_site, parameters={}) == replace(site, parameters={})
    bare = {"sites": (), "golden": None}
    assert replace(loaded, **bare) == replace(defense, **bare)
    assert loaded.sets == ("text", "ciel étoilé")


def test_a_second_round_trip_writes_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    assert everything_below(save(load(folder), tmp_path / "copy")) == everything_below(folder)


def test_float16_rounds_weights_but_not_thresholds_nor_golden_vectors(defense: Defense, tmp_path: Path) -> None:
    loaded = load(save(defense, tmp_path / "half", dtype=np.float16))
    for loaded_site, site in zip(loaded.sites, defense.sites, strict=True):
        for name, tensor in site.parameters.items():
            dtype = np.float32 if name == "threshold" else np.float16
            assert loaded_site.parameters[name].dtype == dtype
            np.testing.assert_array_equal(loaded_site.parameters[name], tensor.astype(dtype))
    assert are_equal(replace(loaded, sites=()), replace(defense, sites=()))


def test_a_defense_without_golden_vectors_has_none_after_loading(defense: Defense, tmp_path: Path) -> None:
    folder = save(replace(defense, golden=None), tmp_path / "text")
    assert load(folder).golden is None
    assert not (folder / GOLDEN).exists()


def test_a_defense_without_sites_can_be_written(defense: Defense, tmp_path: Path) -> None:
    assert load(save(replace(defense, sites=(), golden=None), tmp_path / "none")).sites == ()


def test_arrays_in_any_memory_layout_are_written_as_their_values(defense: Defense, tmp_path: Path) -> None:
    site = defense.sites[0]
    strided = {name: np.repeat(tensor.astype(">f8"), 2, axis=-1)[..., ::2] for name, tensor in site.parameters.items()}
    loaded = load(save(replace(defense, sites=(replace(site, parameters=strided),)), tmp_path / "text"))
    assert are_equal(loaded, replace(defense, sites=(site,)))


def test_only_keeps_the_named_sets_and_drops_what_no_longer_holds(defense: Defense) -> None:
    only = defense.only("ciel étoilé")
    assert only.sets == ("ciel étoilé",)
    assert [site.hook_point for site in only.sites] == ["blocks.7.hook_resid_post"]
    assert only.golden is None
    assert defense.only(*defense.sets).sites == defense.sites


def test_only_names_the_sets_there_are(defense: Defense) -> None:
    with pytest.raises(ConfigError, match="no set 'sky'; it has text, ciel étoilé"):
        defense.only("sky")


def test_joining_merges_sites_that_share_an_sae_and_keeps_the_others(defense: Defense) -> None:
    site = defense.sites[0]
    same = replace(site, sets=(LatentSet("more", (1, 2)),))
    elsewhere = replace(random_site(0, "relu", LatentSet("other", (3,)), seed=9), hook_point=site.hook_point)
    joined = join([defense, replace(defense, sites=(same, elsewhere))])
    assert joined.sites == (replace(site, sets=(*site.sets, *same.sets)), *defense.sites[1:], elsewhere)
    assert joined.sets == (*defense.sets, "more", "other")
    assert joined.golden is None
    assert join([defense]).sites == defense.sites


def test_defenses_of_different_hosts_or_with_sets_of_one_name_are_not_joined(defense: Defense) -> None:
    with pytest.raises(ConfigError, match="different hosts"):
        join([defense, replace(defense, clip=replace(defense.clip, sha256="0" * 64))])
    with pytest.raises(ConfigError, match=f"have a set {defense.sets[0]!r}"):
        join([defense, defense])
    with pytest.raises(ConfigError, match="no defenses"):
        join([])


def test_verify_size_accepts_what_sha256_would_notice(folder: Path) -> None:
    flip_byte(folder / SITE_0, -1)
    load(folder, verify="size")
    with pytest.raises(IntegrityError):
        load(folder)


def test_an_unknown_verify_is_refused_instead_of_checking_nothing(folder: Path) -> None:
    with pytest.raises(ConfigError, match="verify='sha-256'; it must be one of sha256, size"):
        load(folder, verify="sha-256")


def test_loading_imports_no_torch(folder: Path) -> None:
    code = "import sys; from defense.store.defenses import load; load(sys.argv[1]); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code, folder], check=True, cwd=Path(__file__).parents[2])


# --- the manifest's hash belongs to what was read ---------------------------------------------------------------------


def test_a_defense_that_was_read_has_the_hash_of_its_manifest(defense: Defense, folder: Path) -> None:
    assert defense.manifest_sha256 is None
    before = load(folder).manifest_sha256
    assert before == sha256_of(folder / MANIFEST)
    edit_manifest(folder, lambda manifest: manifest.update(licence="another"))
    assert load(folder).manifest_sha256 == sha256_of(folder / MANIFEST) != before


@pytest.mark.parametrize(
    "derive",
    [
        lambda loaded: replace(loaded),
        lambda loaded: replace(loaded, golden=None),
        lambda loaded: loaded.only("text"),
        lambda loaded: loaded.only(*loaded.sets),
        lambda loaded: join([loaded]),
    ],
    ids=["replace nothing", "replace", "only one", "only all", "join"],
)
def test_what_is_derived_from_it_has_none(folder: Path, derive: Callable[[Defense], Defense]) -> None:
    loaded = load(folder)
    assert derive(loaded).manifest_sha256 is None
    assert loaded.manifest_sha256 is not None


def test_a_copy_of_it_keeps_the_hash(folder: Path) -> None:
    loaded = load(folder)
    assert pickle.loads(pickle.dumps(loaded)).manifest_sha256 == loaded.manifest_sha256


def test_nobody_hands_a_hash_in(defense: Defense) -> None:
    with pytest.raises((TypeError, ValueError), match="manifest_sha256"):
        replace(defense, manifest_sha256="ab" * 32)
