"""A machine that runs a pickle's instructions without importing or calling what the pickle names.

A pickle is a program for a stack machine. The interpreter's own machine looks up any name, calls it, and makes room for
what an instruction announces before the bytes are there. This one reads each instruction with `pickletools`, which
takes no more bytes than there are, and knows only the instructions that build plain values. What a name stands for is
for the caller to say.

Time and memory are bounded by what the pickle spells out: there are at most `_MOST_STEPS` instructions, all calls
together are given little more than was written, and the result is a tree that can be printed, compared and copied.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from pickle import UnpicklingError
from typing import Any, BinaryIO, NamedTuple, Protocol

_MOST_STEPS = 1_000_000
_DEEPEST = 100
"""How deep values may be nested."""
_LARGEST_TREE = 50_000_000
"""Values and characters, where what is shared counts each time that it is met."""
_LONGEST_INT = 128
"""Bits. The first number of old checkpoints has 77."""
_HANDED_OVER = 4
"""Entries that calls may be given, per byte of the pickle: to write an entry takes a byte at least."""

_PUSHED = frozenset(
    [
        "INT",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG",
        "LONG1",
        "LONG4",
        "FLOAT",
        "BINFLOAT",
        "UNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE",
        "BINUNICODE8",
        "STRING",
        "BINSTRING",
        "SHORT_BINSTRING",
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINBYTES8",
        "BYTEARRAY8",
    ]
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_IGNORED = ("PROTO", "FRAME", "STOP")
_SIZED = (str, bytes, bytearray, list, tuple, dict, set, frozenset)


class Named(NamedTuple):
    """What stands for a name that the pickle may call."""

    make: Callable[..., Any]


class Meaning(Protocol):
    """What a pickle's names, states and persistent ids mean; each method may refuse by raising."""

    def find(self, module: str, name: str) -> Any:
        """Return what stands for a name: a `Named`, or a value to put in its place."""

    def set_state(self, value: Any, state: Any) -> None:
        """Give a value that a `Named` made the state that the pickle has for it."""

    def load_persistent(self, pid: Any) -> Any:
        """Return what an id stands for whose value lies outside the pickle."""


def evaluate(stream: BinaryIO, meaning: Meaning) -> Any:
    """Return the value of the pickle that begins where a stream stands; the stream is left behind its end.

    Args:
        stream: In memory, since an instruction may announce more than there is.
        meaning: Of the names in it.

    Raises:
        UnpicklingError: It asks for what no checkpoint needs. A damaged pickle raises errors of all kinds.
    """
    machine, start = _Machine(meaning), stream.tell()
    for step, (opcode, argument, position) in enumerate(pickletools.genops(stream)):
        if step == _MOST_STEPS:
            raise UnpicklingError(f"it has more than {_MOST_STEPS:,} instructions")
        assert position is not None  # the stream tells
        machine.step(opcode.name, argument, position - start)
    (value,) = machine.stack
    _check_tree(value)
    return value


class _Machine:
    """A stack, what lies under each mark on it, and the memo."""

    def __init__(self, meaning: Meaning) -> None:
        self.stack: list[Any] = []
        self._meaning = meaning
        self._below: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._handed_over = 0
        self._n_bytes = 0

    def step(self, name: str, argument: Any, n_bytes: int) -> None:
        """Run one instruction, of a pickle of which some bytes were read."""
        self._n_bytes = n_bytes
        if name in _PUSHED:
            if isinstance(argument, int) and argument.bit_length() > _LONGEST_INT:
                raise UnpicklingError(f"it holds an integer of {argument.bit_length():,} bits")
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            self.stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            self.stack.append(tuple(self._popped(_TUPLES[name])))
        elif name in _INSTRUCTIONS:
            _INSTRUCTIONS[name](self, argument)
        elif name not in _IGNORED:
            raise UnpicklingError(f"it has the instruction {name}, which no checkpoint needs")

    def _popped(self, n: int) -> list[Any]:
        """Return the top n values, taken off the stack."""
        if len(self.stack) < n:
            raise UnpicklingError("its stack is empty too early")
        values = self.stack[-n:]
        del self.stack[-n:]
        return values

    def _marked(self) -> list[Any]:
        """Return the values above the last mark, taken off the stack with it."""
        values, self.stack = self.stack, self._below.pop()
        return values

    def _mark(self, _: Any) -> None:
        self._below.append(self.stack)
        self.stack = []

    def _pop(self, _: Any) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self._marked()

    def _pop_mark(self, _: Any) -> None:
        self._marked()

    def _dup(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    # --- containers ---

    def _tuple(self, _: Any) -> None:
        values = tuple(self._marked())
        self.stack.append(values)

    def _list(self, _: Any) -> None:
        values = self._marked()
        self.stack.append(values)

    def _dict(self, _: Any) -> None:
        values = self._marked()
        self.stack.append({})
        self._fill(values)

    def _frozenset(self, _: Any) -> None:
        values = self._marked()
        self.stack.append(frozenset(map(key_of, values)))

    def _append(self, _: Any) -> None:
        self._extend(self._popped(1))

    def _appends(self, _: Any) -> None:
        self._extend(self._marked())

    def _extend(self, values: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise UnpicklingError(f"it appends to a {type(self.stack[-1]).__name__}")
        self.stack[-1].extend(values)

    def _additems(self, _: Any) -> None:
        values = self._marked()
        if not isinstance(self.stack[-1], set):
            raise UnpicklingError(f"it adds to a {type(self.stack[-1]).__name__}")
        self.stack[-1].update(map(key_of, values))

    def _setitem(self, _: Any) -> None:
        self._fill(self._popped(2))

    def _setitems(self, _: Any) -> None:
        self._fill(self._marked())

    def _fill(self, values: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict):
            raise UnpicklingError(f"it sets items of a {type(self.stack[-1]).__name__}")
        self.stack[-1].update(zip(map(key_of, values[::2]), values[1::2], strict=True))

    # --- the memo: a dictionary, so that a high number takes no room ---

    def _put(self, index: int) -> None:
        self._memo[index] = self.stack[-1]

    def _memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self.stack[-1]

    def _get(self, index: int) -> None:
        self.stack.append(self._memo[index])

    # --- names and calls ---

    def _global(self, names: str) -> None:
        module, _, name = names.partition(" ")
        self.stack.append(self._meaning.find(module, name))

    def _stack_global(self, _: Any) -> None:
        module, name = self._popped(2)
        if not (isinstance(module, str) and isinstance(name, str)):
            raise UnpicklingError("it names something by what is no text")
        self.stack.append(self._meaning.find(module, name))

    def _reduce(self, _: Any) -> None:
        named, arguments = self._popped(2)
        self._call(named, arguments, {})

    def _newobj_ex(self, _: Any) -> None:
        named, arguments, options = self._popped(3)
        self._call(named, arguments, options)

    def _call(self, named: Any, arguments: Any, options: Any) -> None:
        if not (isinstance(named, Named) and isinstance(arguments, tuple) and isinstance(options, dict)):
            raise UnpicklingError("it calls what is no function, or with what are no arguments")
        self._handed_over += sum(len(each) for each in (*arguments, *options.values()) if isinstance(each, _SIZED))
        if self._handed_over > _HANDED_OVER * self._n_bytes:
            raise UnpicklingError("it hands the same values over again and again")
        self.stack.append(named.make(*arguments, **options))

    def _build(self, _: Any) -> None:
        (state,) = self._popped(1)
        self._meaning.set_state(self.stack[-1], state)

    def _binpersid(self, _: Any) -> None:
        (pid,) = self._popped(1)
        self.stack.append(self._meaning.load_persistent(pid))


_INSTRUCTIONS: Mapping[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine._mark,
    "POP": _Machine._pop,
    "POP_MARK": _Machine._pop_mark,
    "DUP": _Machine._dup,
    "TUPLE": _Machine._tuple,
    "LIST": _Machine._list,
    "DICT": _Machine._dict,
    "FROZENSET": _Machine._frozenset,
    "APPEND": _Machine._append,
    "APPENDS": _Machine._appends,
    "ADDITEMS": _Machine._additems,
    "SETITEM": _Machine._setitem,
    "SETITEMS": _Machine._setitems,
    "PUT": _Machine._put,
    "BINPUT": _Machine._put,
    "LONG_BINPUT": _Machine._put,
    "MEMOIZE": _Machine._memoize,
    "GET": _Machine._get,
    "BINGET": _Machine._get,
    "LONG_BINGET": _Machine._get,
    "GLOBAL": _Machine._global,
    "STACK_GLOBAL": _Machine._stack_global,
    "REDUCE": _Machine._reduce,
    "NEWOBJ": _Machine._reduce,
    "NEWOBJ_EX": _Machine._newobj_ex,
    "BUILD": _Machine._build,
    "BINPERSID": _Machine._binpersid,
}


def key_of(value: Any) -> Any:
    """Return a key of a dictionary or an entry of a set, whose hash takes no time worth mentioning.

    Raises:
        UnpicklingError: It is no such value: a tuple in a tuple in a tuple may take for ever.
    """
    parts = value if type(value) is tuple else (value,)
    if all(part is None or isinstance(part, (str, bytes, int, float)) for part in parts):
        return value
    raise UnpicklingError(f"it has a {type(value).__name__} for a key, which must be text, a number, or some of these")


def _check_tree(root: Any) -> None:
    """Raise where values are nested too deep, contain themselves, or share so much that the tree explodes."""
    measured: dict[int, tuple[int, int]] = {}

    def measure(value: Any, depth: int) -> tuple[int, int]:
        """Return a value's size and height."""
        if id(value) in measured:
            size, height = measured[id(value)]
        else:
            size, height = 1, 0
            if depth <= _DEEPEST:
                for part in _parts_of(value):
                    inner, below = measure(part, depth + 1)
                    size, height = size + inner, max(height, below + 1)
            if isinstance(value, (str, bytes, bytearray)):
                size += len(value)
            measured[id(value)] = size, height
        if depth + height > _DEEPEST:
            raise UnpicklingError(f"its values are nested more than {_DEEPEST} deep, or contain themselves")
        if size > _LARGEST_TREE:
            raise UnpicklingError("its values contain each other so often that nothing could go through them")
        return size, height

    measure(root, 0)


def _parts_of(value: Any) -> list[Any]:
    """Return what a value holds."""
    if isinstance(value, dict):
        return [*value, *value.values()]
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value)
    return list(vars(value).values()) if hasattr(value, "__dict__") and not isinstance(value, type) else []
