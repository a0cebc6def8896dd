"""51 and 53: what a manifest may say, and what is made of one that says something else."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from defense.errors import CheckpointError, ConfigError, DefenseError, NotThereError
from defense.hosts.defense import Defense
from defense.store import folders
from defense.store.defenses import MANIFEST, SCHEMA, load, save

from .defense_folders import FILES, GOLDEN, SITE_0, SITE_1, are_equal, check_refused, edit_manifest, flip_byte


def test_fault_51_a_missing_folder_is_named(tmp_path: Path) -> None:
    check_refused(tmp_path / "nowhere", str(tmp_path / "nowhere"), "is not there", "defenses.save", error=NotThereError)


def test_fault_51_a_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "sae.pt").write_bytes(b"weights")
    check_refused(tmp_path / "sae.pt", "sae.pt", "a defense is a folder")


def test_fault_51_a_missing_manifest_is_named(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    check_refused(folder, str(folder / MANIFEST), "is missing")


@pytest.mark.parametrize("name", FILES)
def test_fault_51_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    check_refused(folder, str(folder / name), "is missing, though the manifest lists it")


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
    check_refused(folder, str(folder / name), "does not list it: one of them was changed")


def test_a_folder_with_other_files_is_not_written_over(defense: Defense, folder: Path) -> None:
    (folder / "README.md").write_text("mine")
    with pytest.raises(ConfigError, match="holds other files too"):
        save(defense, folder)
    assert (folder / "README.md").read_text() == "mine"


def test_fault_51_a_file_in_place_of_which_there_is_a_folder_is_named(folder: Path) -> None:
    (folder / GOLDEN).unlink()
    (folder / GOLDEN).mkdir()
    check_refused(folder, GOLDEN, "is not a regular file")


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
    check_refused(folder, str(folder / MANIFEST), "is not JSON")


@pytest.mark.parametrize(
    "manifest", [[], "schema", 1, None, {}, {"schema": "1"}, {"schema": True}, {"schema": 0}], ids=str
)
def test_fault_51_json_without_a_schema_is_no_manifest(folder: Path, manifest: object) -> None:
    (folder / MANIFEST).write_text(json.dumps(manifest))
    check_refused(folder, str(folder / MANIFEST), "states no schema")


@pytest.mark.parametrize("key", ["package_version", "host", "preprocess", "sites", "licence", "provenance", "files"])
def test_fault_51_a_missing_key_is_named(folder: Path, key: str) -> None:
    edit_manifest(folder, lambda manifest: manifest.pop(key))
    check_refused(folder, MANIFEST, f"'{key}'")


@pytest.mark.parametrize("within", ["host", "preprocess", "sites", "files"])
def test_fault_51_a_missing_key_within_is_named(folder: Path, within: str) -> None:
    paths = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))[within]
    index = {"sites": 1, "files": SITE_1}.get(within)
    for key in paths if index is None else paths[index]:
        edit_manifest(folder, lambda manifest, key=key: _inner(manifest, within, index).pop(key))
        check_refused(folder, f"'{key}'")
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
    check_refused(folder, f"{key} is {value!r}; want {want}")


def test_fault_51_a_newer_schema_names_the_version_that_wrote_it(folder: Path) -> None:
    edit_manifest(folder, lambda manifest: manifest.update(schema=SCHEMA + 1, package_version="7.8.9", novelty=1))
    check_refused(folder, f"schema {SCHEMA + 1}", f"reads up to {SCHEMA}", "clip-defense 7.8.9")


def test_fault_51_a_file_that_no_site_uses_is_noticed(folder: Path) -> None:
    edit_manifest(folder, lambda manifest: manifest["sites"].pop())
    check_refused(folder, MANIFEST, SITE_1)


def test_fault_51_an_unreadable_file_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sha256_of = folders.sha256_of

    def deny(path: Path) -> str:
        if path.name == SITE_0:
            raise PermissionError(13, "Permission denied", str(path))
        return sha256_of(path)

    monkeypatch.setattr(folders, "sha256_of", deny)
    check_refused(folder, "cannot be read", "Permission denied", SITE_0)


def test_fault_51_values_that_cannot_be_are_refused_as_damage_of_the_manifest(folder: Path) -> None:
    edit_manifest(folder, lambda manifest: manifest["sites"][0]["sets"][0]["gains"].__setitem__(0, 2))
    check_refused(folder, str(folder / MANIFEST), "gain 2.0", "[0, 1]")


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
