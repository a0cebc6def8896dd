"""52, 54 and 62: damaged bytes, files that are no safetensors, names and links that lead out of the folder."""

import ast
import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from defense.errors import DefenseError, IntegrityError
from defense.hosts.defense import Defense
from defense.store.defenses import MANIFEST, load, save
from defense.store.folders import replacing, sha256_of, write_tensors

from .defense_folders import (
    FILES,
    GOLDEN,
    SITE_0,
    SITE_1,
    are_equal,
    check_refused,
    edit_manifest,
    flip_byte,
    random_site,
    rewrite_tensors,
    state_in_manifest,
)


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
    check_refused(folder, SITE_0, error=IntegrityError)


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
    check_refused(folder, str(folder / name), "is not a readable safetensors file", verify=verify)


@pytest.mark.parametrize("verify", ["sha256", "size"])
@pytest.mark.parametrize("damage", ["empty", "truncated in the header", "truncated in the data", "trailing bytes"])
def test_fault_54_a_file_of_another_length_is_refused_with_both_lengths(folder: Path, damage: str, verify: str) -> None:
    before = (folder / SITE_0).read_bytes()
    after = DAMAGED[damage](before)
    (folder / SITE_0).write_bytes(after)
    check_refused(folder, str(folder / SITE_0), f"{len(after)} bytes", f"says {len(before)}", verify=verify)


@pytest.mark.parametrize("fields", [{"pictures": None}, {"more": np.zeros(2, np.float32)}], ids=["missing", "extra"])
def test_fault_54_golden_vectors_with_other_names_are_refused(folder: Path, fields: dict[str, Any]) -> None:
    def edit(tensors: dict[str, np.ndarray]) -> None:
        tensors.update(fields)
        for name in [name for name, tensor in tensors.items() if tensor is None]:
            del tensors[name]

    rewrite_tensors(folder, GOLDEN, edit)
    check_refused(folder, MANIFEST, next(iter(fields)))


@pytest.mark.parametrize("verify", ["sha256", "size"])
def test_fault_62_a_pickle_renamed_to_safetensors_is_refused_and_never_run(
    folder: Path, tmp_path: Path, verify: str
) -> None:
    marker = tmp_path / "was-run"
    payload = pickle.dumps({"W_enc": _Payload(marker)})
    (folder / SITE_0).write_bytes(payload)
    state_in_manifest(folder, SITE_0)
    check_refused(folder, SITE_0, "is not a readable safetensors file", verify=verify)
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
    check_refused(folder, SITE_0, "is not a readable safetensors file")
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
    check_refused(folder, MANIFEST, name, SITE_0)
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
    check_refused(folder, MANIFEST, repr(name), verify=verify)


@pytest.mark.parametrize("name", [SITE_0, GOLDEN, MANIFEST])
def test_a_link_that_leads_out_of_the_folder_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    check_refused(folder, str(folder / name), "leads out of the folder")


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
    check_refused(folder, str(folder / SITE_0), "is not a regular file")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes; runs on Linux and macOS")
def test_a_pipe_is_refused_instead_of_waited_for(folder: Path) -> None:
    (folder / SITE_0).unlink()
    os.mkfifo(folder / SITE_0)
    edit_manifest(folder, lambda manifest: manifest["files"][SITE_0].update(size=0))
    check_refused(folder, str(folder / SITE_0), "is not a regular file")


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
    check_refused(snapshot, "leads out of the folder")


# --- full disks -------------------------------------------------------------------------------------------------------


WRITERS = {"save_file", "save_model", "serialize_file"}
"""Of safetensors: each raises, for a full disk, an error of a kind of its own."""


def _writes_by_itself(node: ast.AST) -> bool:
    """Whether this calls a writer of safetensors, or imports one under another name."""
    if isinstance(node, ast.ImportFrom):
        return any(each.name in WRITERS and each.asname not in (None, each.name) for each in node.names)
    return isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in WRITERS


def test_fault_131_no_module_writes_safetensors_by_itself() -> None:
    """`write_tensors` makes an OSError of what safetensors raises."""
    root = Path(__file__).parents[2]
    found = [
        f"{path.relative_to(root)}:{node.lineno}"
        for room in ("defense", "export", "demo", "benchmarks")
        for path in (root / room).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if _writes_by_itself(node)
    ]
    assert [each.partition(":")[0] for each in found] == ["defense/store/atomic.py"], found


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_fault_131_what_safetensors_says_of_a_full_disk_is_an_error_of_the_system(library, tmp_path) -> None:
    resource = pytest.importorskip("resource", reason="bounds on files; runs on Linux and macOS")
    writer = pytest.importorskip(f"safetensors.{library}")
    made = {"x": np.zeros(9 << 20, np.uint8)} if library == "numpy" else {"x": writer.torch.zeros(9 << 18)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 20, hard))
    try:
        with pytest.raises(OSError, match="File too large") as caught, replacing(tmp_path / "x") as partial:
            write_tensors(made, partial, writer.save_file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.filename == str(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
