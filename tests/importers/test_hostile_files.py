"""Checkpoints that ask for more than they hold, that are damaged, or that hold what nobody can compute with."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import re
import signal
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from defense import importers
from defense.cli import app
from defense.errors import CheckpointError
from defense.importers import common, opcodes, pickles
from defense.store import folders

from .arithmetic import BLOCK, our_orientation
from .published_vision import PRISMA

CASES = Path(__file__).parents[3] / "shared" / "cases"
MIB = 1 << 20
GIB = 1 << 30


def load(data: bytes) -> Any:
    return pickles.load(io.BytesIO(data), "sae.pt")


def zipped(files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def saved(payload: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(payload, buffer, **options)
    return buffer.getvalue()


def rezipped(data: bytes, compression: int) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return zipped({name: archive.read(name) for name in archive.namelist()}, compression)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def number(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def storage(key: str, n_elements: int) -> bytes:
    """A persistent id, as torch.save writes it."""
    return (
        b"(" + text("storage") + named("torch", "FloatStorage") + text(key) + text("cpu") + number(n_elements) + b"tQ"
    )


def tensor(numbers: bytes, size: bytes, stride: bytes) -> bytes:
    rebuild = named("torch._utils", "_rebuild_tensor_v2")
    return rebuild + b"(" + numbers + b"K\0" + size + stride + b"\x89" + named("collections", "OrderedDict") + b")RtR"


@contextmanager
def bounded(n_bytes: int = 64 * MIB, seconds: int = 60):
    """Fail where the block takes that much memory of Python's, or does not end."""

    def give_up(*_: Any) -> None:
        raise AssertionError(f"it has not ended after {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < n_bytes
    finally:
        tracemalloc.stop()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


PROTO = b"\x80\x04"
DOUBLINGS = b")q\0" + b"0h\0h\0\x86q\0" * 200  # t = (t, t), two hundred times
LISTS = b"]q\0" + b"0]q\1(h\0h\0eq\0" * 200

ASK_FOR_MUCH = {
    "bytearray8": (PROTO + b"\x96" + struct.pack("<Q", 3 * GIB) + b".", "expected 3221225472 bytes"),
    "bytes8": (PROTO + b"\x8e" + struct.pack("<Q", 3 * GIB) + b".", "expected 3221225472 bytes"),
    "text": (PROTO + b"X" + struct.pack("<I", 3 * GIB) + b".", "expected 3221225472 bytes"),
    "frame": (PROTO + b"\x95" + struct.pack("<Q", 3 * GIB) + b"\x8c\1a", "exhausted"),
    "bytearray-of-a-number": (
        PROTO + named("builtins", "bytearray") + number(3 * GIB) + b"\x85R.",
        "bytearray of a int",
    ),
    "list-of-a-number": (PROTO + named("builtins", "list") + number(3 * GIB) + b"\x85R.", "list of a int"),
    "integer": (PROTO + b"\x8b" + struct.pack("<i", MIB) + b"\1" * MIB + b".", "integer of"),
    "copies": (
        PROTO + b"](" + b"N" * 20_000 + b"eq\0" + (named("builtins", "list") + b"h\0\x85R0") * 9_000 + b"h\0.",
        "over",
    ),
    "sets": (PROTO + b"](" + b"\x8f" * (MIB + 1) + b"e.", "more than 1,000,000 instructions"),
    "a-stride-of-0": (
        zipped(
            {
                "a/data.pkl": PROTO + tensor(storage("0", 1), number(10**12) + b"\x85", b"K\0\x85") + b".",
                "a/data/0": b"\0" * 4,
            }
        ),
        "a tensor of .*has 1 numbers",
    ),
    "old-storage": (
        pickles._LEGACY
        + pickle.dumps(1001, 2)
        + pickle.dumps({"little_endian": True}, 2)
        + PROTO
        + storage("0", GIB)[: -len(b"tQ")]
        + b"NtQ."
        + pickle.dumps(["0"], 2),
        "more numbers than it has bytes for",
    ),
}


@pytest.mark.parametrize("name", ASK_FOR_MUCH)
def test_fault_83_what_asks_for_more_than_it_holds_is_refused_at_little_cost(name: str) -> None:
    data, message = ASK_FOR_MUCH[name]
    with bounded(512 * MIB if name == "sets" else 32 * MIB), pytest.raises(CheckpointError, match=message):
        load(data)


def test_fault_83_a_high_number_in_the_memo_takes_no_room() -> None:
    with bounded(MIB):
        assert load(PROTO + b"K\x07r" + struct.pack("<I", 2**31 - 1) + b".") == 7


def test_fault_83_the_case_of_35_bytes_is_refused_at_no_cost() -> None:
    path = CASES / "bytearray_3g.pkl"
    if not path.is_file():
        pytest.skip("the shared cases are not beside this checkout")
    with bounded(16 * MIB), pytest.raises(CheckpointError, match="bytearray of a int"):
        importers.read(path)


def test_fault_83_a_storage_that_is_named_often_is_read_once() -> None:
    n = 20_000
    numbers = np.arange(MIB, dtype=np.float32).tobytes()
    files = {"a/data.pkl": PROTO + b"](" + storage("0", MIB) * n + b"e.", "a/data/0": numbers}
    with bounded():
        read = load(zipped(files))
    assert len(read) == n
    assert len({each.data_ptr() for each in read}) == 1


NEVER_END = {
    "tuples": DOUBLINGS,
    "lists": LISTS,
    "a-key": b"}" + DOUBLINGS + b"Ns",
    "an-entry-of-a-set": b"\x8f(" + DOUBLINGS + b"\x90",
    "a-frozen-set": named("builtins", "frozenset") + b"](" + DOUBLINGS + b"e\x85R",
    "the-text-of": named("builtins", "str") + LISTS + b"\x85R",
    "the-fields-of": named("vit_prisma.sae", "Config") + b")\x81}" + text("a") + LISTS + b"sb",
    "itself": b"]q\0h\0a",
    "depth": b"]" * 5000 + b"a" * 4999,
    "a-long-text": text("a" * MIB) + b"q\x000](" + b"h\0" * 1000 + b"e",
}


@pytest.mark.parametrize("name", NEVER_END)
def test_fault_85_values_that_never_end_are_refused(name: str) -> None:
    with bounded(), pytest.raises(CheckpointError, match=r"nested|contain|for a key|makes a"):
        load(PROTO + NEVER_END[name] + b".")


def test_fault_85_what_is_shared_within_reason_is_read() -> None:
    shared = {"kwargs": ["a"] * 100}
    assert load(pickle.dumps([shared] * 1000)) == [shared] * 1000


# --- compressed files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [1, 9])
def test_fault_84_a_gzip_bomb_is_refused_before_it_is_expanded(level: int) -> None:
    data = gzip.compress(b"\0" * (256 * MIB), level)
    with bounded(), pytest.raises(CheckpointError, match="expands to more than 32 times"):
        load(data)


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_fault_84_a_zip_bomb_is_refused_before_it_is_expanded(compression: int) -> None:
    pid = storage("0", 64 * MIB // 4)
    data = zipped({"a/data.pkl": PROTO + pid + b".", "a/data/0": b"\0" * (64 * MIB)}, compression)
    with bounded(16 * MIB), pytest.raises(CheckpointError, match="expands to more than 32 times"):
        load(data)


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_weights_are_read(compression: int) -> None:
    state = our_orientation()
    read = load(rezipped(saved(state), compression))
    assert all(torch.equal(read[name], state[name]) for name in state)
    read = load(gzip.compress(pickle.dumps(state)))
    assert all(torch.equal(read[name], state[name]) for name in state)


FORMS = {
    "zip": lambda payload: saved(payload),
    "zip-deflate": lambda payload: rezipped(saved(payload), zipfile.ZIP_DEFLATED),
    "zip-bzip2": lambda payload: rezipped(saved(payload), zipfile.ZIP_BZIP2),
    "zip-lzma": lambda payload: rezipped(saved(payload), zipfile.ZIP_LZMA),
    "old": lambda payload: saved(payload, _use_new_zipfile_serialization=False),
    "pickle": pickle.dumps,
    "pickle-2": lambda payload: pickle.dumps(payload, 2),
    "gzip": lambda payload: gzip.compress(pickle.dumps(payload)),
}


@pytest.mark.parametrize("form", FORMS)
def test_fault_86_damage_anywhere_is_one_error_or_makes_no_difference_to_reading(form: str) -> None:
    whole = FORMS[form]({"cfg": {"d_in": 3, "name": "a"}, "W_dec": torch.arange(12.0).view(4, 3)})
    errors = []
    for position in range(0, len(whole), 3):
        for damaged in (whole[:position], whole[:position] + bytes([whole[position] ^ 0x41]) + whole[position + 1 :]):
            try:
                load(damaged)
            except CheckpointError as error:
                errors.append(str(error))
    assert len(errors) > len(whole) / 3  # all that were cut, and some more
    assert all("sae.pt" in error for error in errors)


@pytest.mark.parametrize(
    "name", ["gzip_corrupt.pkl.gz", "zip_corrupt_deflate.pt", "zip_nodatapkl.pt", "alpha-zero.png"]
)
def test_fault_86_the_damaged_cases_end_with_code_5(name: str, tmp_path: Path) -> None:
    if not (CASES / name).is_file():
        pytest.skip("the shared cases are not beside this checkout")
    result = CliRunner().invoke(app, ["import", str(CASES / name), str(tmp_path / "out")])
    assert result.exit_code == 5
    assert name in result.stderr.replace("\n", "")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x89PNG\r\n\x1a\n" + bytes(64), r"begins with b'\\x89PNG"),
        (b"\xff\xd8\xff\xe0" + bytes(64), r"begins with b'\\xff\\xd8"),
        (b"%PDF-1.7" + bytes(64), r"begins with b'%PDF"),
        (b"version https://git-lfs.github.com/spec/v1\n", r"begins with b'version https"),
        (zipped({}), "0 files data.pkl"),
        (zipped({"notes.txt": b"x"}), "0 files data.pkl"),
        (zipped({"a/data.pkl": b"N.", "b/data.pkl": b"N."}), "2 files data.pkl"),
    ],
    ids=["png", "jpeg", "pdf", "lfs", "empty-zip", "zip", "two"],
)
def test_fault_86_a_file_of_another_kind_is_told_by_how_it_begins(content: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(content)


# --- what is read is what was saved -----------------------------------------------------------------------------------


def everything() -> dict[str, Any]:
    base = torch.arange(24.0)
    layer = torch.nn.Linear(3, 2)
    torch.nn.init.constant_(layer.weight, 0.25)
    torch.nn.init.zeros_(layer.bias)
    kinds = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8]
    kinds += [torch.uint8, torch.bool, torch.float8_e4m3fn, torch.uint16]
    return {
        **{str(kind): base.to(kind) for kind in kinds},
        "parameter": torch.nn.Parameter(base.view(4, 6)),
        "view": base[3:15].view(3, 4).T,
        "empty": torch.zeros(0, 5),
        "scalar": torch.tensor(3.5),
        "state": layer.state_dict(),
        "ordered": OrderedDict(a=1, b=[2.5, None, True, "x", b"y", (1, (2,))]),
        "complex": 1 + 2j,
        "size": torch.Size([2, 3]),
        "dtype": torch.float32,
        "device": torch.device("cuda", 1),
        "set": {1, 2},
        "frozen": frozenset(["a"]),
        "bytearray": bytearray(b"abc"),
    }


@pytest.mark.parametrize("form", [form for form in FORMS if form != "old"])
def test_what_is_read_is_what_was_saved(form: str) -> None:
    check_same(load(FORMS[form](everything())), everything())


def test_what_is_read_of_an_old_file_is_what_was_saved() -> None:
    """In that form there are no numbers without a storage type of their own."""
    payload = {key: value for key, value in everything().items() if key not in ("torch.float8_e4m3fn", "torch.uint16")}
    check_same(load(FORMS["old"](payload)), payload)


def check_same(read: dict[str, Any], payload: dict[str, Any]) -> None:
    assert list(read) == list(payload)
    for key, value in payload.items():
        if isinstance(value, torch.Tensor):
            assert read[key].dtype == value.dtype
            assert read[key].shape == value.shape
            assert torch.equal(read[key].double(), value.detach().double())
        elif key == "state":
            check_same(read[key], value)
        else:
            assert read[key] == value


@pytest.mark.parametrize("form", ["zip", "old"])
def test_tensors_that_shared_their_numbers_share_them(form: str) -> None:
    base = torch.arange(12.0)
    read = load(FORMS[form]({"a": base, "b": base[4:8]}))
    assert read["b"].data_ptr() == read["a"].data_ptr() + 16


def test_fault_62_no_module_reads_pickles_in_another_way() -> None:
    root = Path(importers.__file__).parents[2]
    readers = re.compile(r"torch\.load\(|pickle\.loads?\(|Unpickler\(|allow_pickle=True|jit\.load\(")
    found = [
        str(path.relative_to(root))
        for folder in ("defense", "export", "benchmarks", "demo")
        for path in (root / folder).rglob("*.py")
        if readers.search(path.read_text(encoding="utf-8"))
    ]
    assert found == []


# --- numbers of other kinds, and names with a prefix ------------------------------------------------------------------

KINDS = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.int8, torch.bool]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_fault_87_weights_that_are_no_floats_of_16_bits_or_more_are_refused(tmp_path: Path, kind, suffix) -> None:
    state = our_orientation()
    state["W_enc"] = state["W_enc"].abs().to(kind)
    path = tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    (tmp_path / "config.json").write_text(json.dumps(PRISMA))
    with pytest.raises(CheckpointError, match=rf"W_enc is {kind}; want a tensor of torch.float32"):
        importers.read(path, "prisma")


@pytest.mark.parametrize("kind", KINDS[:3], ids=str)
def test_fault_87_numbers_that_numpy_does_not_have_are_no_traceback(tmp_path: Path, kind) -> None:
    save_file({"a": torch.ones(4).to(kind)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"x\.safetensors is not a readable safetensors file.*float8"):
        folders.read_tensors(tmp_path / "x.safetensors")


def test_fault_87_an_array_that_promises_more_than_is_there_is_refused(tmp_path: Path) -> None:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({10 * GIB},), }}"
    (tmp_path / "mean.npy").write_bytes(
        b"\x93NUMPY\1\0" + struct.pack("<H", 118) + f"{header:<117}\n".encode() + bytes(16)
    )
    with bounded(16 * MIB), pytest.raises(CheckpointError, match="is not a readable"):
        importers.read_vector(tmp_path / "mean.npy")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.sae."])
@pytest.mark.parametrize("nested", [False, True], ids=["alone", "beside-a-configuration"])
def test_fault_88_a_prefix_that_all_names_share_is_left_out(tmp_path: Path, prefix: str, nested: bool) -> None:
    state = our_orientation()
    wrapped = {prefix + name: value for name, value in state.items()}
    if nested:
        torch.save({"cfg": PRISMA, "state_dict": wrapped}, tmp_path / "sae.pt")
    else:
        torch.save(wrapped, tmp_path / "weights.pt")
        (tmp_path / "config.json").write_text(json.dumps(PRISMA))
    read = importers.read(tmp_path, hook_point=BLOCK, tokens="all")
    assert torch.equal(read.sae.W_dec, state["W_dec"])


def test_fault_88_names_that_differ_in_their_first_part_stay(tmp_path: Path) -> None:
    torch.save({"encoder.weight": torch.ones(2), "decoder.weight": torch.ones(2)}, tmp_path / "sae.pt")
    assert common.Source(tmp_path / "sae.pt").keys == {"encoder.weight", "decoder.weight"}


def test_the_machine_leaves_the_stream_behind_the_end() -> None:
    class Nothing:
        def find(self, module: str, name: str) -> Any:
            raise AssertionError(module, name)

        set_state = load_persistent = find

    stream = io.BytesIO(pickle.dumps([1, "a"]) + b"rest")
    assert opcodes.evaluate(stream, Nothing()) == [1, "a"]
    assert stream.read() == b"rest"
