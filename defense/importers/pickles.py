"""Reading published `.pt`, `.pth`, `.pkl` and `.pkl.gz` files without running what is in them.

A pickle is a program. torch's own safe reader (`weights_only=True`) goes first. It refuses files that hold a
configuration object beside the tensors, as Prisma's and patchsae's do; those go through an unpickler of ours that
knows tensors, containers and plain values. For the configuration classes of those two projects it puts an `Inert`
object, which keeps its fields and has no code. Every other name ends the reading.

Files of `torch.save` since torch 1.6 are read this way, plain pickles and gzipped ones by our unpickler alone, and
files of older versions by torch's reader alone.
"""

from __future__ import annotations

import collections
import gzip
import io
import pickle
import zipfile
from typing import Any, BinaryIO, NoReturn

import torch
from torch import Tensor

from defense.errors import CheckpointError

_CONFIG_PACKAGES = {"vit_prisma", "sae_training"}
_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_VALUES = {kind.__name__: kind for kind in (bytearray, complex, dict, float, frozenset, int, list, set, str, tuple)}
_DAMAGE: tuple[type[Exception], ...] = (pickle.UnpicklingError, zipfile.BadZipFile, EOFError, MemoryError, OSError)
_DAMAGE += (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_GZIP = b"\x1f\x8b"
_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""How files of torch.save began before torch 1.6: a magic number, pickled."""


class Inert:
    """Stands for an object whose class is not loaded: it keeps its fields and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> Inert:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            vars(self).update(part or {})


def load(stream: BinaryIO, name: str) -> Any:
    """Return what was saved: tensors on the CPU in containers, plain values, and `Inert` objects.

    Args:
        stream: The file, at its beginning; seekable.
        name: What messages call it.

    Raises:
        CheckpointError: It is damaged, is no such file, or needs code to be read.
    """
    start = stream.read(len(_LEGACY))
    stream.seek(0)
    try:
        if zipfile.is_zipfile(stream):
            return _load_zip(stream, name)
        stream.seek(0)
        if start == _LEGACY:
            return torch.load(stream, map_location="cpu", weights_only=True)
        if start.startswith(_GZIP):
            stream = io.BytesIO(gzip.decompress(stream.read()))
        return _Unpickler(stream, name).load()
    except CheckpointError:
        raise
    except _DAMAGE as error:
        raise CheckpointError(f"{name} is no checkpoint that can be read, or a damaged one: {error}") from error


def _load_zip(stream: BinaryIO, name: str) -> Any:
    stream.seek(0)
    try:
        return torch.load(stream, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # it holds more than weights
        stream.seek(0)
    with zipfile.ZipFile(stream) as archive:
        root = next(entry for entry in archive.namelist() if entry.endswith("data.pkl")).removesuffix("data.pkl")
        if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
            raise CheckpointError(f"{name} was written on a big-endian machine; save it again on another")
        return _Unpickler(io.BytesIO(archive.read(f"{root}data.pkl")), name, archive, root).load()


class _Unpickler(pickle.Unpickler):
    """Reads tensors, containers and plain values, and puts `Inert` for configurations; refuses every other name."""

    def __init__(self, stream: BinaryIO, name: str, archive: zipfile.ZipFile | None = None, root: str = "") -> None:
        super().__init__(stream)
        self._name, self._archive, self._root = name, archive, root

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return _tensor
        if module == "torch._utils" and name == "_rebuild_parameter":
            return _parameter
        if module == "torch.storage" and name == "_load_from_bytes":
            return _storage_from_bytes
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if module == "torch" and name in ("device", "Size"):
            return getattr(torch, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module == "collections" and name == "OrderedDict":
            return collections.OrderedDict
        if module in ("builtins", "__builtin__") and name in _VALUES:
            return _VALUES[name]
        if module.split(".")[0] == "pathlib" or _CONFIG_PACKAGES & set(module.split(".")):
            return type(name, (Inert,), {"__module__": module})
        self._refuse(module, name)

    def _refuse(self, module: str, name: str) -> NoReturn:
        raise CheckpointError(
            f"{self._name} needs {module}.{name} to be read, and reading it would run code. If it is a whole model, "
            "save its weights in a process that trusts it: torch.save(model.state_dict(), FILE)"
        )

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, key, _, n_elements = pid
        if self._archive is None or kind != "storage" or not isinstance(dtype, torch.dtype):
            raise CheckpointError(f"{self._name} refers to a tensor in a way that torch.save does not")
        data = self._archive.read(f"{self._root}data/{key}")
        storage = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
        if len(storage) != n_elements:
            raise CheckpointError(f"{self._name}: a tensor has {len(storage)} numbers, not {n_elements}")
        return storage


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    """Stand for torch._utils._rebuild_tensor: a view of a one-dimensional tensor; torch checks its bounds."""
    return torch.as_strided(storage, size, stride, offset)


def _parameter(data: Tensor, *_: Any) -> Tensor:
    return data


def _storage_from_bytes(data: bytes) -> Tensor:
    """Read the storages of a plain pickle, each of which is a file of torch's within the file."""
    storage = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return torch.empty(0, dtype=storage.dtype).set_(storage._untyped_storage)  # storage.untyped() warns
