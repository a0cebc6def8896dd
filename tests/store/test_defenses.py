"""A defense on disk: what is written comes back, and nothing else is ever accepted."""

import json
import os
import pickle
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from defense.core.config import SAEConfig
from defense.core.latents import LatentSet
from defense.data.preprocess import Preprocess
from defense.errors import (
    CheckpointError,
    ConfigError,
    DefenseError,
    IntegrityError,
    NonFiniteError,
    NotThereError,
    ShapeError,
)
from defense.hosts.defense import ClipId, Defense, Golden, Site, join
from defense.store import defenses, folders
from defense.store.defenses import MANIFEST, SCHEMA, load, save
from defense.store.folders import sha256_of

D_MODEL, D_SAE = 6, 10
SITE_0, SITE_1, GOLDEN = "site-0.safetensors", "site-1.safetensors", "golden.safetensors"
FILES = (SITE_0, SITE_1, GOLDEN)


def random_site(block: int, act: str, *sets: LatentSet, seed: int = 0) -> Site:
    rng = np.random.default_rng(seed)
    shapes = {"W_enc": (D_MODEL, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_MODEL), "b_dec": (D_MODEL,)}
    if act == "jumprelu":
        shapes["threshold"] = (D_SAE,)
    config = SAEConfig(D_MODEL, D_SAE, act, k=3 if act == "topk" else None)
    parameters = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return Site(f"blocks.{block}.hook_resid_post", config, parameters, sets)


@pytest.fixture
def defense() -> Defense:
    """Two sites, three sets, golden vectors, and text that is not ASCII."""
    rng = np.random.default_rng(1)
    text = LatentSet("text", (3, 1), (0.0, 0.25), scores={"effect": (0.5, 0.1)}, provenance={"n_pairs": 8})
    sky = LatentSet("ciel étoilé", (4,), edit="set", scope="patch", values=(0.1,))
    return Defense(
        ClipId("ViT-B-32", "laion2b_s34b_b79k", "ab" * 32, False, D_MODEL, 12),
        Preprocess((8, 8), (0.5, 0.4, 0.3), (0.5, 0.6, 0.7), "bicubic", "shortest"),
        (random_site(7, "jumprelu", text, sky), random_site(9, "topk", replace(text, edit="project"), seed=2)),
        Golden(
            rng.integers(0, 256, (3, 8, 8, 3), np.uint8),
            rng.normal(size=(3, 5)).astype(np.float32),
            rng.normal(size=(3, 5)).astype(np.float32),
        ),
        license="© Łukasz: frei für alle, 自由",
        provenance={"seed": 3, "report": {"plain": {"accuracy": 0.5}}, "name": "да"},
    )


@pytest.fixture
def folder(defense: Defense, tmp_path: Path) -> Path:
    """The defense on disk."""
    return save(defense, tmp_path / "text")


def arrays_of(defense: Defense) -> list[dict[str, np.ndarray]]:
    golden = [] if defense.golden is None else [vars(defense.golden)]
    return [*(dict(site.parameters) for site in defense.sites), *golden]


def are_equal(one: Defense, other: Defense) -> bool:
    """Whether all tensors are equal in names, types, shapes and bits."""
    return [
        {name: (array.dtype, array.shape, array.tobytes()) for name, array in arrays.items()}
        for arrays in arrays_of(one)
    ] == [
        {name: (array.dtype, array.shape, array.tobytes()) for name, array in arrays.items()}
        for arrays in arrays_of(other)
    ]


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    edit(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def state_in_manifest(folder: Path, name: str) -> None:
    """Let the manifest state the size and sha256 that a file has now."""
    entry = {"sha256": sha256_of(folder / name), "size": (folder / name).stat().st_size}
    edit_manifest(folder, lambda manifest: manifest["files"].update({name: entry}))


def rewrite_tensors(folder: Path, name: str, edit: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Change the tensors of a file, and the manifest with it."""
    tensors = safetensors.numpy.load_file(folder / name)
    edit(tensors)
    safetensors.numpy.save_file(tensors, folder / name)
    state_in_manifest(folder, name)


def everything_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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


# --- writing is all or nothing ----------------------------------------------------------------------------------------


def test_an_existing_defense_is_replaced_whole(defense: Defense, folder: Path) -> None:
    smaller = replace(defense, sites=defense.sites[:1], golden=None)
    assert save(smaller, folder) == folder
    assert sorted(path.name for path in folder.iterdir()) == [MANIFEST, SITE_0]
    assert are_equal(load(folder), smaller)
    assert list(folder.parent.iterdir()) == [folder]


def test_a_damaged_defense_may_be_replaced(defense: Defense, folder: Path) -> None:
    (folder / SITE_1).unlink()
    flip_byte(folder / SITE_0, 0)
    assert are_equal(load(save(defense, folder)), defense)


def test_a_defense_can_be_saved_over_the_one_it_was_loaded_from(folder: Path) -> None:
    before = everything_below(folder)
    save(load(folder), folder)
    assert everything_below(folder) == before


def test_an_empty_folder_is_filled(defense: Defense, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert are_equal(load(save(defense, tmp_path / "empty")), defense)


def test_saving_through_a_link_keeps_the_link(defense: Defense, folder: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(folder)
    smaller = replace(defense, golden=None)
    assert save(smaller, link) == link
    assert link.is_symlink()
    assert are_equal(load(folder), smaller)
    assert sorted(tmp_path.iterdir()) == [link, folder]


def test_a_relative_path_is_taken_from_the_working_directory(
    defense: Defense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert save(defense, "text") == Path("text")
    assert are_equal(load("text"), defense)


@pytest.mark.parametrize("failing", ["save_file", "load"])
@pytest.mark.parametrize(
    "error", [OSError("No space left on device"), KeyboardInterrupt()], ids=["disk full", "Ctrl-C"]
)
def test_a_failure_while_writing_leaves_the_old_defense_and_no_debris(
    defense: Defense, folder: Path, monkeypatch: pytest.MonkeyPatch, failing: str, error: BaseException
) -> None:
    before = everything_below(folder.parent)
    real, n_calls = getattr(defenses, failing), 0

    def fail_late(*args: Any, **options: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        real(*args, **options)
        if failing == "load" or n_calls == 2:
            raise error

    monkeypatch.setattr(defenses, failing, fail_late)
    with pytest.raises(type(error)):
        save(replace(defense, license="other"), folder)
    assert n_calls > 0
    assert everything_below(folder.parent) == before
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("error", [OSError("busy"), KeyboardInterrupt()], ids=["OSError", "Ctrl-C"])
def test_a_failure_while_renaming_puts_the_old_defense_back(
    defense: Defense, folder: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    before = everything_below(folder.parent)
    real = Path.rename

    def fail_into_place(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise error
        return real(path, target)

    monkeypatch.setattr(Path, "rename", fail_into_place)
    with pytest.raises(type(error)):
        save(replace(defense, license="other"), folder)
    assert everything_below(folder.parent) == before
    assert list(folder.parent.iterdir()) == [folder]


def _file(target: Path) -> None:
    target.write_text("mine")


def _other_folder(target: Path) -> None:
    target.mkdir()
    (target / "thesis.tex").write_text("mine")


def _web_app(target: Path) -> None:
    target.mkdir()
    (target / MANIFEST).write_text('{"name": "a browser extension has such a file too", "manifest_version": 3}')


def _newer_defense(target: Path) -> None:
    target.mkdir()
    (target / MANIFEST).write_text(json.dumps({"schema": SCHEMA + 1, "files": {}}))


@pytest.mark.parametrize("make", [_file, _other_folder, _web_app, _newer_defense])
def test_a_target_that_is_no_defense_is_refused_and_untouched(
    defense: Defense, tmp_path: Path, make: Callable[[Path], None]
) -> None:
    target = tmp_path / "target"
    make(target)
    before = everything_below(tmp_path)
    with pytest.raises(ConfigError, match="target exists and is no defense, or holds other files too"):
        save(defense, target)
    assert everything_below(tmp_path) == before
    assert list(tmp_path.iterdir()) == [target]


def test_a_defense_with_files_of_others_beside_it_is_refused_and_untouched(defense: Defense, folder: Path) -> None:
    (folder / "notes.md").write_text("mine")
    before = everything_below(folder.parent)
    with pytest.raises(ConfigError, match="holds other files too"):
        save(defense, folder)
    assert everything_below(folder.parent) == before


@pytest.mark.skipif(os.name != "posix", reason="permission bits; runs on Linux and macOS")
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002], ids=oct)
def test_permission_bits_follow_the_umask(defense: Defense, tmp_path: Path, mask: int) -> None:
    before = stat.S_IMODE(tmp_path.stat().st_mode)
    old = os.umask(mask)
    try:
        folder = save(defense, tmp_path / "text")
    finally:
        os.umask(old)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~mask
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o666 & ~mask}
    assert stat.S_IMODE(tmp_path.stat().st_mode) == before


@pytest.mark.parametrize(
    "value", [Path("x"), np.float32(1), float("nan"), {1, 2}], ids=["path", "numpy scalar", "NaN", "set"]
)
def test_provenance_that_json_cannot_hold_is_refused(defense: Defense, tmp_path: Path, value: object) -> None:
    with pytest.raises(ConfigError, match="cannot be written as JSON"):
        save(replace(defense, provenance={"value": value}), tmp_path / "text")
    assert list(tmp_path.iterdir()) == []


# --- 51: the folder and its manifest ----------------------------------------------------------------------------------


def _raises(folder: Path, *parts: str, verify: str = "sha256", error: type[DefenseError] = CheckpointError) -> None:
    with pytest.raises(error) as caught:
        load(folder, verify=verify)
    assert type(caught.value) is error
    for part in parts:
        assert part in str(caught.value)


def test_fault_51_a_missing_folder_is_named(tmp_path: Path) -> None:
    _raises(tmp_path / "nowhere", f"{tmp_path / 'nowhere'} is not there", "defenses.save", error=NotThereError)


def test_fault_51_a_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "sae.pt").write_bytes(b"weights")
    _raises(tmp_path / "sae.pt", "sae.pt", "a defense is a folder")


def test_fault_51_a_missing_manifest_is_named(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    _raises(folder, str(folder / MANIFEST), "is missing")


@pytest.mark.parametrize("name", FILES)
def test_fault_51_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    _raises(folder, str(folder / name), "is missing, though the manifest lists it")


def test_what_the_manifest_does_not_name_is_not_read(defense: Defense, folder: Path) -> None:
    """As a repository has it: a card, git's and other libraries' files, and even a pickle, a pipe or a broken link."""
    for name in ("README.md", ".gitattributes", "config.json", "sae.pt", "golden.safetensors.x"):
        (folder / name).write_bytes(b"\x80 not what it says")
    (folder / "more").mkdir()
    (folder / "link").symlink_to("nowhere")
    assert are_equal(load(folder), defense)


@pytest.mark.parametrize("name", ["site-2.safetensors", GOLDEN])
def test_a_file_of_a_defense_that_the_manifest_does_not_name_is_refused(folder: Path, name: str) -> None:
    (folder / name).touch()
    edit_manifest(folder, lambda manifest: manifest["files"].pop(name, None))
    _raises(folder, str(folder / name), "does not list it: one of them was changed")


def test_a_folder_with_other_files_is_not_written_over(defense: Defense, folder: Path) -> None:
    (folder / "README.md").write_text("mine")
    with pytest.raises(ConfigError, match="holds other files too"):
        save(defense, folder)
    assert (folder / "README.md").read_text() == "mine"


def test_fault_51_a_file_in_place_of_which_there_is_a_folder_is_named(folder: Path) -> None:
    (folder / GOLDEN).unlink()
    (folder / GOLDEN).mkdir()
    _raises(folder, GOLDEN, "is not a regular file")


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b'{"schema": 1', id="cut off"),
        pytest.param(b"\xff\xfe{}", id="not UTF-8"),
        pytest.param(b"<html>404</html>", id="HTML"),
        pytest.param(b'{"schema": NaN}', id="NaN"),
        pytest.param(b'{"schema": 1, "files": {"a": Infinity}}', id="Infinity"),
        pytest.param(b'{"schema": 1, "schema": 1}', id="a key twice"),
        pytest.param(b"[" * 100_000, id="nested without end"),
        pytest.param(b'{"schema": ' + b"9" * 5000 + b"}", id="an integer of 5000 digits"),
    ],
)
def test_fault_51_a_manifest_that_is_not_json_is_named(folder: Path, text: bytes) -> None:
    (folder / MANIFEST).write_bytes(text)
    _raises(folder, str(folder / MANIFEST), "is not JSON")


@pytest.mark.parametrize(
    "manifest", [[], "schema", 1, None, {}, {"schema": "1"}, {"schema": True}, {"schema": 0}], ids=str
)
def test_fault_51_json_without_a_schema_is_no_manifest(folder: Path, manifest: object) -> None:
    (folder / MANIFEST).write_text(json.dumps(manifest))
    _raises(folder, str(folder / MANIFEST), "states no schema")


@pytest.mark.parametrize("key", ["package_version", "host", "preprocess", "sites", "licence", "provenance", "files"])
def test_fault_51_a_missing_key_is_named(folder: Path, key: str) -> None:
    edit_manifest(folder, lambda manifest: manifest.pop(key))
    _raises(folder, MANIFEST, f"'{key}'")


@pytest.mark.parametrize("within", ["host", "preprocess", "sites", "files"])
def test_fault_51_a_missing_key_within_is_named(folder: Path, within: str) -> None:
    paths = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))[within]
    index = {"sites": 1, "files": SITE_1}.get(within)
    for key in paths if index is None else paths[index]:
        edit_manifest(folder, lambda manifest, key=key: _inner(manifest, within, index).pop(key))
        _raises(folder, f"'{key}'")
        edit_manifest(folder, lambda manifest: manifest.update({within: paths}))
    load(folder)


def _inner(manifest: dict[str, Any], within: str, index: Any) -> dict[str, Any]:
    return manifest[within] if index is None else manifest[within][index]


@pytest.mark.parametrize(
    ("within", "key", "value", "want"),
    [
        ("host", "d_model", True, "int"),
        ("host", "d_model", "6", "int"),
        ("host", "quick_gelu", 0, "bool"),
        ("host", "pretrained", 5, "str | None"),
        (None, "licence", None, "str"),
        (None, "provenance", [], "dict"),
        (None, "sites", {}, "list"),
    ],
)
def test_fault_51_a_value_of_another_type_is_named(
    folder: Path, within: str | None, key: str, value: object, want: str
) -> None:
    edit_manifest(folder, lambda manifest: (manifest if within is None else manifest[within]).update({key: value}))
    _raises(folder, f"{key} is {value!r}; want {want}")


def test_fault_51_a_newer_schema_names_the_version_that_wrote_it(folder: Path) -> None:
    edit_manifest(folder, lambda manifest: manifest.update(schema=SCHEMA + 1, package_version="7.8.9", novelty=1))
    _raises(folder, f"schema {SCHEMA + 1}", f"reads up to {SCHEMA}", "clip-defense 7.8.9")


def test_fault_51_a_file_that_no_site_uses_is_noticed(folder: Path) -> None:
    edit_manifest(folder, lambda manifest: manifest["sites"].pop())
    _raises(folder, MANIFEST, SITE_1)


def test_fault_51_an_unreadable_file_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sha256_of = folders.sha256_of

    def deny(path: Path) -> str:
        if path.name == SITE_0:
            raise PermissionError(13, "Permission denied", str(path))
        return sha256_of(path)

    monkeypatch.setattr(folders, "sha256_of", deny)
    _raises(folder, "cannot be read", "Permission denied", SITE_0)


def test_fault_51_values_that_cannot_be_are_refused_as_damage_of_the_manifest(folder: Path) -> None:
    edit_manifest(folder, lambda manifest: manifest["sites"][0]["sets"][0]["gains"].__setitem__(0, 2))
    _raises(folder, str(folder / MANIFEST), "gain 2.0", "[0, 1]")


# --- 52: damaged bytes ------------------------------------------------------------------------------------------------


def flip_byte(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def _header_size(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


POSITIONS: dict[str, Callable[[Path], int]] = {
    "length of the header": lambda path: 0,
    "header": lambda path: 8 + path.read_bytes()[8:].index(b"dtype"),
    "last of the header": lambda path: _header_size(path) - 1,
    "first of the data": _header_size,
    "middle of the data": lambda path: (_header_size(path) + path.stat().st_size) // 2,
    "last": lambda path: path.stat().st_size - 1,
}


@pytest.mark.parametrize("where", POSITIONS)
@pytest.mark.parametrize("name", FILES)
def test_fault_52_one_flipped_bit_is_noticed(folder: Path, name: str, where: str) -> None:
    path = folder / name
    want = sha256_of(path)
    flip_byte(path, POSITIONS[where](path))
    with pytest.raises(IntegrityError) as caught:
        load(folder)
    for error in (caught.value, pickle.loads(pickle.dumps(caught.value))):
        assert (error.file, error.want, error.got) == (str(path), want, sha256_of(path))
        assert all(part in str(error) for part in (name, want[:16], sha256_of(path)[:16]))


def test_fault_52_two_files_exchanged_are_noticed(defense: Defense, tmp_path: Path) -> None:
    twin = random_site(8, "jumprelu", seed=5)
    folder = save(replace(defense, sites=(defense.sites[0], twin)), tmp_path / "text")
    (folder / SITE_0).rename(folder / "tmp")
    (folder / SITE_1).rename(folder / SITE_0)
    (folder / "tmp").rename(folder / SITE_1)
    _raises(folder, SITE_0, error=IntegrityError)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_fault_52_a_flipped_bit_gives_a_defense_or_an_error_of_this_package_even_unverified(
    folder: Path, data: st.DataObject
) -> None:
    path = folder / data.draw(st.sampled_from(FILES))
    position = data.draw(st.integers(0, _header_size(path) - 1) | st.integers(0, path.stat().st_size - 1))
    bit = data.draw(st.integers(0, 7))
    flip_byte(path, position, bit)
    try:
        load(folder, verify="size")
    except DefenseError:
        pass
    finally:
        flip_byte(path, position, bit)


# --- 53 follows with the command `defense info --expect`; here: no edit of the manifest changes a t

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(FILES),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [place for key in keys for place in [(value, key), *_places(value[key])]]


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_a_manifest_with_one_value_changed_is_refused_or_loads_the_same_tensors(
    defense: Defense, folder: Path, data: st.DataObject
) -> None:
    text = (folder / MANIFEST).read_text(encoding="utf-8")
    manifest = json.loads(text)
    container, key = data.draw(st.sampled_from(_places(manifest)))
    change = data.draw(st.sampled_from(["replace", "remove", "rename"]))
    value = container.pop(key)
    if change == "rename" and isinstance(container, dict):
        container[data.draw(st.text(max_size=5) | st.sampled_from(FILES))] = value
    elif change == "replace":
        new = data.draw(JSON_VALUES)
        container.update({key: new}) if isinstance(container, dict) else container.insert(key, new)
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    try:
        assert are_equal(load(folder), defense)
    except DefenseError:
        pass
    finally:
        (folder / MANIFEST).write_text(text, encoding="utf-8")


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_a_manifest_with_one_bit_changed_is_refused_or_loads_the_same_tensors(
    defense: Defense, folder: Path, data: st.DataObject
) -> None:
    path = folder / MANIFEST
    position, bit = data.draw(st.integers(0, path.stat().st_size - 1)), data.draw(st.integers(0, 7))
    flip_byte(path, position, bit)
    try:
        assert are_equal(load(folder), defense)
    except DefenseError:
        pass
    finally:
        flip_byte(path, position, bit)


@given(st.binary(max_size=200) | JSON_VALUES.map(lambda value: json.dumps(value).encode()))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_bytes_for_a_manifest_are_refused(folder: Path, data: bytes) -> None:
    (folder / MANIFEST).write_bytes(data)
    with pytest.raises(CheckpointError):
        load(folder)


# --- 54 and 62: files that are no safetensors -------------------------------------------------------------------------


class _Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def _with_header(header: object, data: bytes = b"\0" * 16) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


DAMAGED: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "eight bytes": lambda data: data[:8],
    "truncated in the header": lambda data: data[:40],
    "truncated in the data": lambda data: data[:-4],
    "trailing bytes": lambda data: data + b"\0" * 8,
    "giant header": lambda data: b"\xff" * 7 + b"\x7f" + data[8:],
    "lying shape": lambda data: _with_header({"W_enc": {"dtype": "F32", "shape": [9, 9], "data_offsets": [0, 16]}}),
    "shape that overflows": lambda data: _with_header(
        {"W_enc": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 16]}}
    ),
    "overlapping tensors": lambda data: _with_header(
        {name: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for name in ("W_enc", "b_enc")}
    ),
    "offsets beyond the end": lambda data: _with_header({"a": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}}),
    "unknown dtype": lambda data: _with_header({"a": {"dtype": "F7", "shape": [4], "data_offsets": [0, 16]}}),
    "header that is no JSON": lambda data: _with_header(b"not json"),
    "header that is no UTF-8": lambda data: _with_header(b'{"\xff": 1}'),
    "zip": lambda data: b"PK\x03\x04" + data,
    "HTML": lambda data: b"<html><body>404 Not Found</body></html>",
}


@pytest.mark.parametrize("verify", ["sha256", "size"])
@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("name", [SITE_0, GOLDEN])
def test_fault_54_a_damaged_file_is_refused_even_if_the_manifest_states_it(
    folder: Path, name: str, damage: str, verify: str
) -> None:
    (folder / name).write_bytes(DAMAGED[damage]((folder / name).read_bytes()))
    state_in_manifest(folder, name)
    _raises(folder, str(folder / name), "is not a readable safetensors file", verify=verify)


@pytest.mark.parametrize("verify", ["sha256", "size"])
@pytest.mark.parametrize("damage", ["empty", "truncated in the header", "truncated in the data", "trailing bytes"])
def test_fault_54_a_file_of_another_length_is_refused_with_both_lengths(folder: Path, damage: str, verify: str) -> None:
    before = (folder / SITE_0).read_bytes()
    after = DAMAGED[damage](before)
    (folder / SITE_0).write_bytes(after)
    _raises(folder, str(folder / SITE_0), f"{len(after)} bytes", f"says {len(before)}", verify=verify)


@pytest.mark.parametrize("fields", [{"pictures": None}, {"more": np.zeros(2, np.float32)}], ids=["missing", "extra"])
def test_fault_54_golden_vectors_with_other_names_are_refused(folder: Path, fields: dict[str, Any]) -> None:
    def edit(tensors: dict[str, np.ndarray]) -> None:
        tensors.update(fields)
        for name in [name for name, tensor in tensors.items() if tensor is None]:
            del tensors[name]

    rewrite_tensors(folder, GOLDEN, edit)
    _raises(folder, MANIFEST, next(iter(fields)))


@pytest.mark.parametrize("verify", ["sha256", "size"])
def test_fault_62_a_pickle_renamed_to_safetensors_is_refused_and_never_run(
    folder: Path, tmp_path: Path, verify: str
) -> None:
    marker = tmp_path / "was-run"
    payload = pickle.dumps({"W_enc": _Payload(marker)})
    (folder / SITE_0).write_bytes(payload)
    state_in_manifest(folder, SITE_0)
    _raises(folder, SITE_0, "is not a readable safetensors file", verify=verify)
    assert not marker.exists()
    pickle.loads(payload)
    assert marker.exists()  # the payload works


def test_fault_62_a_torch_checkpoint_renamed_to_safetensors_is_refused_and_never_run(
    folder: Path, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    marker = tmp_path / "was-run"
    torch.save({"W_enc": _Payload(marker)}, folder / SITE_0)
    state_in_manifest(folder, SITE_0)
    _raises(folder, SITE_0, "is not a readable safetensors file")
    assert not marker.exists()


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".pkl", ".bin", ".npz", ".ckpt"])
def test_fault_62_a_pickle_that_the_manifest_lists_is_refused_and_never_run(
    folder: Path, tmp_path: Path, suffix: str
) -> None:
    marker = tmp_path / "was-run"
    name = f"site-0{suffix}"
    (folder / SITE_0).unlink()
    (folder / name).write_bytes(pickle.dumps(_Payload(marker)))
    edit_manifest(folder, lambda manifest: manifest["files"].pop(SITE_0))
    state_in_manifest(folder, name)
    _raises(folder, MANIFEST, name, SITE_0)
    assert not marker.exists()


# --- names and links that lead out of the folder ----------------------------------------------------------------------


@pytest.mark.parametrize("verify", ["sha256", "size"])
@pytest.mark.parametrize(
    "name", ["../x.safetensors", "{}/x.safetensors", "./site-0.safetensors", "a/../site-0.safetensors", "", "..", "x\0"]
)
def test_a_manifest_that_lists_files_elsewhere_is_refused(folder: Path, tmp_path: Path, name: str, verify: str) -> None:
    name = name.format(tmp_path)
    shutil.copy(folder / SITE_0, tmp_path / "x.safetensors")

    def edit(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = manifest["files"].pop(SITE_0)

    edit_manifest(folder, edit)
    _raises(folder, MANIFEST, repr(name), verify=verify)


@pytest.mark.parametrize("name", [SITE_0, GOLDEN, MANIFEST])
def test_a_link_that_leads_out_of_the_folder_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    _raises(folder, str(folder / name), "leads out of the folder")


def test_a_link_within_the_folder_is_followed(defense: Defense, tmp_path: Path) -> None:
    twins = replace(defense, sites=(defense.sites[0], defense.sites[0]))
    folder = save(twins, tmp_path / "text")
    (folder / SITE_1).unlink()
    (folder / SITE_1).symlink_to(SITE_0)
    assert are_equal(load(folder), twins)


def test_a_link_to_the_folder_is_followed(defense: Defense, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    assert are_equal(load(tmp_path / "link"), defense)


@pytest.mark.parametrize("target", ["nowhere", SITE_0], ids=["dangling", "to itself"])
def test_a_link_that_leads_nowhere_is_refused(folder: Path, target: str) -> None:
    (folder / SITE_0).unlink()
    (folder / SITE_0).symlink_to(target)
    _raises(folder, str(folder / SITE_0), "is not a regular file")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes; runs on Linux and macOS")
def test_a_pipe_is_refused_instead_of_waited_for(folder: Path) -> None:
    (folder / SITE_0).unlink()
    os.mkfifo(folder / SITE_0)
    edit_manifest(folder, lambda manifest: manifest["files"][SITE_0].update(size=0))
    _raises(folder, str(folder / SITE_0), "is not a regular file")


def _as_hub_snapshot(folder: Path, cache: Path, is_shared: bool) -> Path:
    """Lay a folder out as the Hugging Face hub's cache does: links to blobs, which may be links to a shared store."""
    repo = cache / "models--org--repo"
    snapshot = repo / "snapshots" / ("0" * 40)
    for made in (snapshot, repo / "blobs", cache / "blobs" / "ab"):
        made.mkdir(parents=True)
    for path in folder.iterdir():
        blob = repo / "blobs" / sha256_of(path)
        (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
        if is_shared:
            path.rename(cache / "blobs" / "ab" / blob.name)
            blob.symlink_to(f"../../blobs/ab/{blob.name}")
        else:
            path.rename(blob)
    return snapshot


@pytest.mark.parametrize("is_shared", [False, True], ids=["blobs of the repository", "blobs of the cache"])
def test_a_snapshot_in_the_cache_of_the_hub_loads(
    defense: Defense, folder: Path, tmp_path: Path, is_shared: bool
) -> None:
    assert are_equal(load(_as_hub_snapshot(folder, tmp_path / "hub", is_shared)), defense)


def test_a_snapshot_in_the_cache_of_the_hub_may_not_lead_out_of_it(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / SITE_0, tmp_path / "outside")
    snapshot = _as_hub_snapshot(folder, tmp_path / "hub", is_shared=False)
    (snapshot / SITE_0).unlink()
    (snapshot / SITE_0).symlink_to(tmp_path / "outside")
    _raises(snapshot, "leads out of the folder")


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
        _raises(folder, name, tensor, "NaN or infinity", verify=verify, error=NonFiniteError)


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
    _raises(folder, MANIFEST)


def test_fault_61_unsafe_on_disk_is_refused(folder: Path) -> None:
    edit_manifest(folder, lambda manifest: manifest["sites"][0]["sets"][0].update(gains=[2, -1], unsafe=True))
    _raises(folder, MANIFEST, "unsafe=True", "bring them into [0, 1]")
