"""Reading published `.pt`, `.pth`, `.pkl` and `.pkl.gz` files without running what is in them.

A pickle is a program. Nothing of it is run here, by torch's readers neither: `opcodes.py` evaluates it, and what its
names stand for is said below, which is tensors, containers and plain values. For the configuration classes of Prisma
and patchsae it is an `Inert` object, which keeps its fields and has no code. Every other name ends the reading.

`torch.save` has written two forms: a zip archive with a pickle and a file for each tensor's numbers, and, before torch
1.6, several pickles followed by the numbers. Plain pickles, gzipped or not, hold tensors in the second form. Whatever a
file announces is held against its own size before there is room made for it.
"""

from __future__ import annotations

import collections
import gzip
import io
import math
import zipfile
from collections.abc import Callable
from pickle import UnpicklingError
from typing import Any, BinaryIO, NoReturn

import torch
from torch import Tensor

from defense.errors import CheckpointError

from .opcodes import Named, evaluate, key_of

_CONFIG_PACKAGES = {"vit_prisma", "sae_training"}
_STORAGES = {
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
    "UntypedStorage": torch.uint8,
}
_GZIP = b"\x1f\x8b"
_BEGINNINGS = (b"PK", _GZIP, b"\x80")
_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""How files of torch.save began before torch 1.6: a magic number, pickled."""
_LEGACY_PROTOCOL = 1001
_RATIO = 32
"""Bytes that a compressed one may stand for. Weights shrink by a tenth; a bomb is a thousand times its file."""
_SMALL = 1 << 20
"""Bytes that are expanded whatever the ratio."""


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
        CheckpointError: It is damaged, is no such file, needs code to be read, or asks for far more memory than its
            size accounts for.
    """
    start = stream.read(len(_LEGACY))
    stream.seek(0)
    try:
        if zipfile.is_zipfile(stream):
            return _load_zip(stream, name)
        stream.seek(0)
        data = _expanded(stream) if start.startswith(_GZIP) else stream.read()
        if start.startswith(_LEGACY):
            return _load_legacy(data, name)
        return evaluate(io.BytesIO(data), _Names(name))
    except CheckpointError:
        raise
    except Exception as error:  # there is no list of what damaged archives and pickles raise
        what = str(error) or type(error).__name__
        if not start.startswith(_BEGINNINGS):
            what = f"it begins with {start[:16]!r}, as nothing does that torch.save writes; as a pickle, {what}"
        raise CheckpointError(f"{name} is no checkpoint that can be read, or a damaged one: {what}") from error


def _expanded(stream: BinaryIO) -> bytes:
    """Return what is in a gzip file."""
    most = _RATIO * stream.seek(0, io.SEEK_END) + _SMALL
    stream.seek(0)
    expanded = bytearray()
    with gzip.GzipFile(fileobj=stream) as file:
        while chunk := file.read(_SMALL):
            expanded += chunk
            if len(expanded) > most:
                raise UnpicklingError(f"it expands to more than {_RATIO} times its size; expand it yourself if it may")
    return bytes(expanded)


def _load_zip(stream: BinaryIO, name: str) -> Any:
    size = stream.seek(0, io.SEEK_END)
    with zipfile.ZipFile(stream) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if sum(entry.file_size for entry in archive.infolist()) > _RATIO * size + _SMALL:
            raise UnpicklingError(f"it expands to more than {_RATIO} times its size; write it again with torch.save")
        roots = [entry.removesuffix("data.pkl") for entry in entries if f"/{entry}".endswith("/data.pkl")]
        if len(roots) != 1:
            raise CheckpointError(f"{name} is a zip archive with {len(roots)} files data.pkl; torch.save writes one")
        (root,) = roots
        if f"{root}byteorder" in entries and archive.read(f"{root}byteorder") != b"little":
            raise CheckpointError(f"{name} was written on a big-endian machine; save it again on another")

        def storage(key: str, dtype: torch.dtype, n_elements: int) -> Tensor:
            data = archive.read(f"{root}data/{key}")
            found = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
            if len(found) != n_elements:
                raise CheckpointError(f"{name}: a tensor has {len(found)} numbers, not {n_elements}")
            return found

        return evaluate(io.BytesIO(archive.read(f"{root}data.pkl")), _Names(name, storage))


def _load_legacy(data: bytes, name: str) -> Any:
    """Return what torch.save wrote before torch 1.6.

    That is five pickles: a magic number, the protocol, the machine, what was saved, the keys of its storages in the
    order of the file. For each key follow the number of elements, int64, and the elements.
    """
    stream, plain = io.BytesIO(data), _Names(name)
    evaluate(stream, plain)
    protocol, machine = evaluate(stream, plain), evaluate(stream, plain)
    if protocol != _LEGACY_PROTOCOL or machine["little_endian"] is not True:
        raise CheckpointError(f"{name} was written by a machine or in a form that is not supported; save it again")
    storages: dict[str, Tensor] = {}
    room = len(data)

    def storage(key: str, dtype: torch.dtype, n_elements: int) -> Tensor:
        nonlocal room
        room -= n_elements * dtype.itemsize
        if n_elements < 0 or room < 0:
            raise CheckpointError(f"{name} is cut off, or its tensors claim more numbers than it has bytes for")
        storages[key] = torch.zeros(n_elements, dtype=dtype)
        return storages[key]

    saved = evaluate(stream, _Names(name, storage))
    keys = evaluate(stream, plain)
    if sorted(keys) != sorted(storages):
        raise CheckpointError(f"{name} lists other tensors than it uses")
    for key in keys:
        tensor = storages[key]
        n_elements = int.from_bytes(stream.read(8), "little", signed=True)
        numbers = stream.read(tensor.nbytes)
        if n_elements != len(tensor) or len(numbers) != tensor.nbytes:
            raise CheckpointError(f"{name} is cut off: a tensor of {len(tensor)} numbers is not all there")
        if numbers:
            tensor.copy_(torch.frombuffer(bytearray(numbers), dtype=tensor.dtype))
    return saved


class _Names:
    """What the names in a checkpoint's pickle stand for.

    Args:
        checkpoint: What messages call it.
        storage: From a storage's key, dtype and number of elements to its numbers, a tensor [n]; None where there are
            no storages beside the pickle.
    """

    def __init__(self, checkpoint: str, storage: Callable[[str, torch.dtype, int], Tensor] | None = None) -> None:
        self._checkpoint, self._storage = checkpoint, storage
        self._storages: dict[tuple[str, torch.dtype], Tensor] = {}

    def find(self, module: str, name: str) -> Any:
        """Return what stands for a name."""
        if module == "torch.storage" and name == "_load_from_bytes" and self._storage is None:
            return Named(self._storage_from_bytes)
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) in _CALLS:
            return _CALLS[module, name]
        if module.split(".")[0] == "pathlib" or _CONFIG_PACKAGES & set(module.split(".")):
            return Named(type(name, (Inert,), {"__module__": module}))
        self._refuse(module, name)

    def _refuse(self, module: str, name: str) -> NoReturn:
        raise CheckpointError(
            f"{self._checkpoint} needs {module}.{name} to be read, and reading it would run code. If it is a whole "
            "model, save its weights in a process that trusts it: torch.save(model.state_dict(), FILE)"
        )

    def set_state(self, value: Any, state: Any) -> None:
        """Give an `Inert` object its fields; what a state dict has beside its entries is left out."""
        if isinstance(value, Inert):
            value.__setstate__(state)
        elif not isinstance(value, (collections.OrderedDict, Tensor)):
            raise UnpicklingError(f"it sets the state of a {type(value).__name__}")

    def load_persistent(self, pid: Any) -> Tensor:
        """Return the numbers of a storage, [n], the same tensor each time."""
        kind, dtype, key, _, n_elements, *view = pid
        if self._storage is None or kind != "storage" or not isinstance(dtype, torch.dtype) or type(key) is not str:
            raise CheckpointError(f"{self._checkpoint} refers to a tensor in a way that torch.save does not")
        if (key, dtype) not in self._storages:
            self._storages[key, dtype] = self._storage(key, dtype, n_elements)
        storage = self._storages[key, dtype]
        if view and view[0] is not None:  # a part of it, in files of torch 0.3 and older
            _, offset, size = view[0]
            return storage[offset : offset + size]
        return storage

    def _storage_from_bytes(self, data: bytes) -> Tensor:
        """Read the storage of a plain pickle, which is a file of torch.save's within the file."""
        if not data.startswith(_LEGACY):
            raise UnpicklingError("it holds a tensor in a form that torch.save does not write")
        storage = _load_legacy(data, self._checkpoint)
        if not isinstance(storage, Tensor):
            raise UnpicklingError("it holds something else where a tensor's numbers should be")
        return storage


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    """Stand for torch._utils._rebuild_tensor: a view of a one-dimensional tensor; torch checks its bounds."""
    if math.prod(size) > storage.numel():  # strides of 0, by which a number stands for any amount
        raise UnpicklingError(f"a tensor of {list(size)} has {storage.numel()} numbers")
    return torch.as_strided(storage, size, stride, offset)


def _tensor_of_dtype(
    storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], _: Any, __: Any, dtype: torch.dtype
) -> Tensor:
    """Stand for torch._utils._rebuild_tensor_v3: a view of bytes, for dtypes without a storage of their own."""
    return _tensor(storage.view(dtype), offset, size, stride)


def _parameter(data: Tensor, *_: Any) -> Tensor:
    return data


def _bytearray(data: Any = b"", encoding: str = "") -> bytearray:
    """Stand for bytearray, which makes as many bytes as a number says."""
    if isinstance(data, str):
        return bytearray(_encoded(data, encoding))
    if not isinstance(data, bytes):
        raise UnpicklingError(f"it makes a bytearray of a {type(data).__name__}")
    return bytearray(data)


def _encoded(text: str, encoding: str) -> bytes:
    """Stand for _codecs.encode, by which old protocols write bytes."""
    if encoding not in ("latin1", "latin-1"):
        raise UnpicklingError(f"it encodes text as {encoding!r}")
    return text.encode("latin-1")


def _plain(kind: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that makes a number or text of numbers or text."""

    def made(*values: Any) -> Any:
        if not all(isinstance(value, (str, int, float)) for value in values):
            raise UnpicklingError(f"it makes a {kind.__name__} of something else than text and numbers")
        return kind(*values)

    return made


def _container(kind: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that makes a container of its entries: a mapping of pairs, or of another mapping."""

    def made(entries: Any = ()) -> Any:
        if not isinstance(entries, (list, tuple, dict, set, frozenset)):
            raise UnpicklingError(f"it makes a {kind.__name__} of a {type(entries).__name__}")
        if kind in (list, tuple):
            return kind(entries)
        if kind in (set, frozenset):
            return kind(map(key_of, entries))
        pairs = entries.items() if isinstance(entries, dict) else entries
        return kind([(key_of(key), value) for key, value in pairs])

    return made


_CALLS = {
    ("torch._utils", "_rebuild_tensor"): Named(_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): Named(_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): Named(_tensor_of_dtype),
    ("torch._utils", "_rebuild_parameter"): Named(_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): Named(_parameter),
    ("torch", "device"): Named(_plain(torch.device)),
    ("torch", "Size"): Named(_container(tuple)),
    ("_codecs", "encode"): Named(_encoded),
    ("collections", "OrderedDict"): Named(_container(collections.OrderedDict)),
    ("collections", "Counter"): Named(_container(dict)),
}
for _builtins in ("builtins", "__builtin__"):
    _CALLS[_builtins, "bytearray"] = Named(_bytearray)
    _CALLS |= {(_builtins, kind.__name__): Named(_plain(kind)) for kind in (complex, float, int, str)}
    _CALLS |= {(_builtins, kind.__name__): Named(_container(kind)) for kind in (dict, frozenset, list, set, tuple)}
