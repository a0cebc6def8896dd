"""Damaged and hostile checkpoints: one error each, and nothing of them is run."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from safetensors.torch import save_file

from defense import importers
from defense.errors import CheckpointError, ConfigError, HookPointError, NonFiniteError, ShapeError
from defense.importers import pickles

from .arithmetic import STATED, D, M, our_orientation, pickled_class, with_fields
from .published_text import sparsify
from .published_vision import PRISMA


def test_fault_57_a_transposed_encoder_is_refused(tmp_path: Path) -> None:
    state = our_orientation()
    state["W_enc"] = state["W_enc"].T.contiguous()
    (tmp_path / "config.json").write_text(json.dumps(PRISMA))
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(ShapeError, match=rf"W_enc is \[{M}, {D}\]; its config says \[{D}, {M}\]"):
        importers.read(tmp_path)


@pytest.mark.parametrize("broken", ["b_dec", "W_dec"])
def test_fault_57_a_missing_tensor_is_named(tmp_path: Path, broken: str) -> None:
    state = our_orientation()
    del state[broken]
    (tmp_path / "config.json").write_text(json.dumps(PRISMA))
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=rf"missing \['{broken}'\]"):
        importers.read(tmp_path, "prisma")


def test_fault_57_a_zero_decoder_row_is_refused(tmp_path: Path) -> None:
    state = our_orientation()
    state["W_dec"][3] = 0
    (tmp_path / "config.json").write_text(json.dumps(PRISMA))
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="decoder row 3 is zero"):
        importers.read(tmp_path)


def test_fault_55_a_number_that_is_none_is_refused(tmp_path: Path) -> None:
    state = our_orientation()
    state["b_enc"][2] = float("nan")
    (tmp_path / "config.json").write_text(json.dumps(PRISMA))
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(NonFiniteError, match="b_enc"):
        importers.read(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_float_type_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    case = sparsify(tmp_path)
    from safetensors.torch import load_file

    state = {key: value.to(dtype) for key, value in load_file(case.path / "sae.safetensors").items()}
    save_file(state, case.path / "sae.safetensors")
    read = importers.read(case.path, **case.stated)
    torch.testing.assert_close(read.sae.W_dec, state["W_dec"].float(), rtol=0, atol=0)


class Malicious:
    """Creates a file when it is unpickled by a reader that runs what it reads."""

    def __init__(self, target: Path, function: Callable = os.system) -> None:
        self.target, self.function = target, function

    def __reduce__(self):
        return (self.function, (f"touch {self.target}",) if self.function is os.system else (str(self.target),))


class MaliciousConfig:
    """The same behind the name of a class that a stand-in is made for."""

    def __init__(self, target: Path) -> None:
        self.inner = Malicious(target)


def write_zip(payload: Any, path: Path) -> None:
    torch.save(payload, path)


def write_legacy(payload: Any, path: Path) -> None:
    torch.save(payload, path, _use_new_zipfile_serialization=False)


def write_pickle(payload: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(payload))


def write_gzip(payload: Any, path: Path) -> None:
    path.write_bytes(gzip.compress(pickle.dumps(payload)))


def write_saev(payload: Any, path: Path) -> None:
    with path.open("wb") as file:
        file.write(b'{"schema": 2}\n')
        torch.save(payload, file)


@pytest.mark.parametrize("write", [write_zip, write_legacy, write_pickle, write_gzip, write_saev])
@pytest.mark.parametrize("function", [os.system, os.mkdir, exec], ids=["os.system", "os.mkdir", "exec"])
def test_fault_62_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path, write, function) -> None:
    target = tmp_path / "created"
    path = tmp_path / "sae.pt"
    write({"cfg": Malicious(target, function), "state_dict": our_orientation()}, path)
    with pytest.raises(CheckpointError):
        importers.read(path, "prisma", **STATED, act="relu", norm="none")
    assert not target.exists()
    assert path.exists()


def test_fault_62_the_malicious_pickle_of_these_tests_does_harm_elsewhere(tmp_path: Path) -> None:
    target = tmp_path / "created"
    pickle.loads(pickle.dumps(Malicious(target)))
    assert target.exists()


def test_fault_62_a_stand_in_does_not_open_the_door_to_others(tmp_path: Path) -> None:
    target = tmp_path / "created"
    with pickled_class("vit_prisma.sae.config", "VisionModelSAERunnerConfig") as made:
        config = with_fields(made, PRISMA | {"device": Malicious(target)})
        torch.save({"cfg": config, "state_dict": our_orientation()}, tmp_path / "sae.pt")
    with pytest.raises(CheckpointError, match=r"needs (posix|nt)\.system"):
        importers.read(tmp_path)
    assert not target.exists()


def test_fault_62_names_below_a_known_package_are_stand_ins_too(tmp_path: Path) -> None:
    """A file may claim that a function of a known package is to be called: nothing is imported, nothing runs."""
    target = tmp_path / "created"
    module = tmp_path / "sae_training.py"
    module.write_text(f"import pathlib; pathlib.Path({str(target)!r}).touch()\ndef harm(*args): pass\n")
    payload = b"\x80\x02csae_training\nharm\n(X\x01\x00\x00\x00at\x85R."
    code = (
        "import io, sys; sys.path.insert(0, sys.argv[1])\n"
        "from defense.importers import pickles\n"
        "assert isinstance(pickles.load(io.BytesIO(bytes.fromhex(sys.argv[2])), 'x'), pickles.Inert)\n"
        "assert 'sae_training' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), payload.hex()], check=True, cwd=Path(__file__).parents[2]
    )
    assert not target.exists()


def test_fault_62_a_whole_module_is_refused_with_the_way_out(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "sae.pt")
    with pytest.raises(CheckpointError, match=r"torch\.nn\.modules\.linear\.Linear .*model\.state_dict\(\)"):
        importers.read(tmp_path)


@pytest.mark.parametrize("write", [write_zip, write_pickle, write_gzip])
def test_fault_54_a_truncated_file_is_refused_at_any_length(tmp_path: Path, write) -> None:
    path = tmp_path / "sae.pt"
    write({"cfg": dict(PRISMA), "state_dict": our_orientation()}, path)
    whole = path.read_bytes()
    for length in range(0, len(whole), max(1, len(whole) // 23)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            importers.read(path, "prisma")


def test_fault_54_a_file_with_flipped_bytes_never_escapes_as_another_exception(tmp_path: Path) -> None:
    path = tmp_path / "sae.pt"
    with pickled_class("vit_prisma.sae.config", "VisionModelSAERunnerConfig") as made:
        write_pickle({"cfg": with_fields(made, PRISMA), "state_dict": {"b_enc": [1.0, 2.0]}}, path)
    whole = bytearray(path.read_bytes())
    for position in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[position] ^= 0x55
        path.write_bytes(damaged)
        with pytest.raises((CheckpointError, ConfigError, HookPointError)):
            importers.read(path, "prisma", **STATED)


@pytest.mark.parametrize("content", [b"", b"hello", b"{not json", b"\x1f\x8bbroken", b"PK\x03\x04broken"])
def test_fault_54_what_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    for name in ("sae.pt", "sae.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError):
            importers.read(tmp_path / name)


def test_a_tensor_beyond_its_storage_is_refused() -> None:
    with pytest.raises(RuntimeError):
        pickles._tensor(torch.zeros(4), 2, (3,), (1,))


def test_tensors_of_configuration_files_share_nothing_and_keep_views(tmp_path: Path) -> None:
    """The unpickler's own way of rebuilding tensors: offsets, strides, empty ones and parameters."""
    base = torch.arange(12.0)
    tensors = {"view": base[2:8].view(2, 3), "transposed": base.view(3, 4).T, "empty": torch.zeros(0, 3)}
    tensors |= {"half": base.half(), "bf16": base.bfloat16(), "ints": torch.arange(3), "bool": base > 3}
    tensors["parameter"] = torch.nn.Parameter(base)
    with pickled_class("vit_prisma.sae.config", "VisionModelSAERunnerConfig") as made:
        for write in (write_zip, write_pickle):
            write({"cfg": made(), **tensors}, tmp_path / "x.pt")
            with (tmp_path / "x.pt").open("rb") as file:
                read = pickles.load(file, "x")
            assert isinstance(read.pop("cfg"), pickles.Inert)
            for name, tensor in tensors.items():
                torch.testing.assert_close(read[name], tensor.data, rtol=0, atol=0)
