"""A pickle machine that builds plain data and runs nothing.

It imports nothing and calls nothing but the functions that it is given: any other class or function that a pickle
names stays a name, and its instances become stubs. Only the opcodes of protocols 2 to 5 that torch.save's picklers
write are known (the opcodes: CPython's ``pickletools``). The standard library's unpicklers are not used: even with
``find_class`` overridden, their C implementation can be made to allocate without bound (memo indexes, one-byte
containers) or to overflow the C stack (hashing a deep tuple).
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MethodType
from typing import Any, BinaryIO, NoReturn

MAX_OPCODES = 2**24
MAX_BYTES = 768 * 1024 * 1024
"""The most memory, as estimated, for containers, long strings and stubs; opcodes take at most 40 bytes each besides."""

MAX_NODES = 2**26
MAX_DEPTH = 200
"""What walking through the result may cost: its nodes, shared ones counted each time, and its depth."""

_LIST_BYTES, _DICT_BYTES, _SET_BYTES, _TUPLE_BYTES, _CALL_BYTES, _STUB_BYTES = 88, 232, 256, 56, 800, 320
_LONG_STRING = 64
_MAX_NAME_LENGTH = 1000
_MAX_INT_BYTES = 1024
_MAX_KEY_PARTS = 64
_MAX_RARE_KEYS = 4096
"""Keys whose hash an attacker can choose: with many equal ones a dict takes quadratic time."""
_SCALARS = (str, bytes, int, float, bool, type(None))
_CONTAINERS = (dict, list, tuple, set, frozenset)


class PickleError(Exception):
    """A pickle that is damaged, or that asks for what plain data does not need."""


@dataclass(frozen=True)
class Reference:
    """A class or function that a pickle names: its name and nothing of the thing itself."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, repr=False, slots=True)
class Stub:
    """An object of an unknown class, as plain data: what its class would have been called with and given.

    ``name`` is the qualified name of the class or function, ``args`` what it was called with (keywords as a dict at
    the end), ``state`` what ``__setstate__`` would get, and ``items`` what would be appended or added (pairs, where
    it is a mapping). Two stubs are equal if they are of one name and have equal scalar arguments and nothing else, as
    the members of an enumeration are; other stubs are equal to themselves alone.
    """

    name: str
    args: tuple[Any, ...]
    state: Any = None
    items: list[Any] = field(default_factory=list)

    @property
    def is_unique(self) -> bool:
        """Whether the stub is equal to itself alone."""
        is_bare = self.state is None and not self.items and len(self.args) <= _MAX_KEY_PARTS
        return not is_bare or not all(isinstance(arg, _SCALARS) for arg in self.args)

    def _identity(self) -> object:
        return id(self) if self.is_unique else (self.name, self.args)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stub) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def __repr__(self) -> str:
        return f"<{self.name}>"


_OPCODES: dict[bytes, Callable[[Unpickler], None]] = {}


def _opcode(*codes: bytes) -> Callable[[Callable[[Unpickler], None]], Callable[[Unpickler], None]]:
    def register(function: Callable[[Unpickler], None]) -> Callable[[Unpickler], None]:
        _OPCODES.update(dict.fromkeys(codes, function))
        return function

    return register


class Unpickler:
    """Builds what one pickle of ``stream`` describes.

    ``calls`` are the functions that may be called, by the module and name under which a pickle knows them; ``values``
    are what other names mean. Both are compared whole. ``persistent_load`` gets the persistent ids.
    """

    def __init__(
        self,
        stream: BinaryIO,
        calls: Mapping[tuple[str, str], Callable[..., Any]],
        values: Mapping[tuple[str, str], Any],
        persistent_load: Callable[[Any], Any],
    ) -> None:
        self._read = stream.read
        self._readline = stream.readline
        self._calls = self._plain_calls() | dict(calls)
        self._values = values
        self._persistent_load = persistent_load
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: list[Any] = []
        self._stubs: list[Stub] = []
        self._bytes_left = MAX_BYTES
        self._rare_keys_left = _MAX_RARE_KEYS

    def load(self) -> Any:
        """The value; the stream then stands after the pickle.

        Lists, dicts, tuples and sets of it have no cycle and can be walked through in bounded time and depth.

        Raises:
            PickleError: the pickle is damaged, or asks for too much.
        """
        try:
            self._run()
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, struct.error) as error:
            raise PickleError(f"its pickle is not valid ({type(error).__name__})") from error
        finally:
            self._calls = {}  # They hold this object; without them it goes at once, with stream, memo and storages.
        if len(self._stack) != 1 or self._marked:
            raise PickleError("its pickle does not end with one value")
        (value,) = self._stack
        _check_walks([value, *((stub.args, stub.state, stub.items) for stub in self._stubs)])
        return value

    def _run(self) -> None:
        read = self._read
        opcodes = {code: MethodType(function, self) for code, function in _OPCODES.items()}
        for _ in range(MAX_OPCODES):
            code = read(1)
            if code == b".":
                return
            execute = opcodes.get(code)
            if execute is None:
                _refuse_opcode(code)
            execute()
        raise PickleError(f"its pickle has more than {MAX_OPCODES} opcodes")

    def _spend(self, nbytes: int) -> None:
        self._bytes_left -= nbytes
        if self._bytes_left < 0:
            raise PickleError(f"its pickle would take more than {MAX_BYTES} bytes of memory")

    # Scalars

    @_opcode(b"\x80")
    def _proto(self) -> None:
        if self._read(1) not in (b"\x02", b"\x03", b"\x04", b"\x05"):
            raise PickleError("its pickle has an unknown protocol, expected 2 to 5")

    @_opcode(b"\x95")
    def _frame(self) -> None:
        self._read(8)

    @_opcode(b"N")
    def _none(self) -> None:
        self._stack.append(None)

    @_opcode(b"\x88")
    def _true(self) -> None:
        self._stack.append(True)

    @_opcode(b"\x89")
    def _false(self) -> None:
        self._stack.append(False)

    @_opcode(b"J")
    def _int4(self) -> None:
        self._stack.append(int.from_bytes(self._read(4), "little", signed=True))

    @_opcode(b"K")
    def _int1(self) -> None:
        self._stack.append(self._read(1)[0])

    @_opcode(b"M")
    def _int2(self) -> None:
        self._stack.append(self._size(2))

    @_opcode(b"\x8a")
    def _long1(self) -> None:
        self._stack.append(int.from_bytes(self._read(self._size(1)), "little", signed=True))

    @_opcode(b"\x8b")
    def _long4(self) -> None:
        length = self._size(4)
        if length > _MAX_INT_BYTES:
            raise PickleError(f"its pickle holds an integer of {length} bytes")
        self._stack.append(int.from_bytes(self._read(length), "little", signed=True))

    @_opcode(b"G")
    def _float(self) -> None:
        self._stack.append(struct.unpack(">d", self._read(8))[0])

    # Strings

    @_opcode(b"\x8c", b"U")
    def _string1(self) -> None:
        self._stack.append(self._chunk(self._read(1)[0]).decode())

    @_opcode(b"X", b"T")
    def _string4(self) -> None:
        self._push_string(self._size(4))

    @_opcode(b"\x8d")
    def _string8(self) -> None:
        self._push_string(self._size(8))

    @_opcode(b"C")
    def _bytes1(self) -> None:
        self._stack.append(self._chunk(self._read(1)[0]))

    @_opcode(b"B")
    def _bytes4(self) -> None:
        self._stack.append(self._chunk(self._size(4)))

    @_opcode(b"\x8e")
    def _bytes8(self) -> None:
        self._stack.append(self._chunk(self._size(8)))

    @_opcode(b"\x96")
    def _bytearray8(self) -> None:
        chunk = self._chunk(self._size(8))
        self._spend(len(chunk))
        self._stack.append(bytearray(chunk))

    def _size(self, width: int) -> int:
        return int.from_bytes(self._read(width), "little")

    def _chunk(self, length: int) -> bytes:
        """At most ``length`` bytes: the stream ends after a short read, so the next opcode is missed at once."""
        if length > _LONG_STRING:
            self._spend(length)
        return self._read(length)

    def _push_string(self, length: int) -> None:
        chunk = self._chunk(length)
        if length > _LONG_STRING and not chunk.isascii():
            self._spend(4 * length)
        self._stack.append(chunk.decode())

    # Containers

    @_opcode(b"(")
    def _mark(self) -> None:
        self._spend(_LIST_BYTES)
        self._marked.append(self._stack)
        self._stack = []

    def _pop_mark(self) -> list[Any]:
        items = self._stack
        self._stack = self._marked.pop()
        return items

    @_opcode(b"0")
    def _pop(self) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._pop_mark()

    @_opcode(b"1")
    def _pop_to_mark(self) -> None:
        self._pop_mark()

    @_opcode(b"2")
    def _duplicate(self) -> None:
        self._stack.append(self._stack[-1])

    @_opcode(b")")
    def _empty_tuple(self) -> None:
        self._stack.append(())

    @_opcode(b"t")
    def _tuple(self) -> None:
        self._push_tuple(tuple(self._pop_mark()))

    @_opcode(b"\x85")
    def _tuple1(self) -> None:
        self._push_tuple((self._stack.pop(),))

    @_opcode(b"\x86")
    def _tuple2(self) -> None:
        second, first = self._stack.pop(), self._stack.pop()
        self._push_tuple((first, second))

    @_opcode(b"\x87")
    def _tuple3(self) -> None:
        third, second, first = self._stack.pop(), self._stack.pop(), self._stack.pop()
        self._push_tuple((first, second, third))

    def _push_tuple(self, value: tuple[Any, ...]) -> None:
        self._spend(_TUPLE_BYTES)
        self._stack.append(value)

    @_opcode(b"]")
    def _empty_list(self) -> None:
        self._spend(_LIST_BYTES)
        self._stack.append([])

    @_opcode(b"}")
    def _empty_dict(self) -> None:
        self._spend(_DICT_BYTES)
        self._stack.append({})

    @_opcode(b"\x8f")
    def _empty_set(self) -> None:
        self._spend(_SET_BYTES)
        self._stack.append(set())

    @_opcode(b"\x91")
    def _frozenset(self) -> None:
        self._spend(_SET_BYTES)
        items = self._pop_mark()
        self._stack.append(frozenset(self._keys(items)))

    @_opcode(b"a")
    def _append(self) -> None:
        item = self._stack.pop()
        self._extend([item])

    @_opcode(b"e")
    def _appends(self) -> None:
        self._extend(self._pop_mark())

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is Stub:
            target.items.extend(items)
        elif type(target) is list:
            target.extend(items)
        else:
            _refuse("appends to", target)

    @_opcode(b"\x90")
    def _add_items(self) -> None:
        items = self._pop_mark()
        target = self._stack[-1]
        if type(target) is Stub:
            target.items.extend(items)
        elif type(target) is set:
            target.update(self._keys(items))
        else:
            _refuse("adds items to", target)

    @_opcode(b"s")
    def _set_item(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set_pairs([(key, value)])

    @_opcode(b"u")
    def _set_items(self) -> None:
        items = self._pop_mark()
        self._set_pairs(list(zip(items[::2], items[1::2], strict=True)))

    def _set_pairs(self, pairs: list[tuple[Any, Any]]) -> None:
        target = self._stack[-1]
        if type(target) is Stub:
            target.items.extend(pairs)
        elif type(target) is dict:
            self._keys(key for key, _ in pairs)
            target.update(pairs)
        else:
            _refuse("sets items of", target)

    def _keys(self, keys: Iterable[Any]) -> Iterable[Any]:
        """``keys``, after a look at each: hashing a deep or wide tuple takes unbounded stack or time."""
        keys = list(keys)
        for key in keys:
            if type(key) is not str:
                self._check_key(key)
        return keys

    def _check_key(self, key: Any) -> None:
        parts = key if type(key) is tuple else (key,)
        if len(parts) > _MAX_KEY_PARTS:
            raise PickleError(f"its pickle has a key that is a tuple of {len(parts)}")
        for part in parts:
            if not isinstance(part, (*_SCALARS, Enum, Reference, Stub)):
                raise PickleError(f"its pickle has a key of type {type(part).__name__}")
            if type(part) is int and not -(2**63) <= part < 2**64:
                raise PickleError("its pickle has an integer of more than 64 bits as a key")
        if type(key) not in (int, bytes, bool) and not (type(key) is Stub and key.is_unique):
            self._rare_keys_left -= 1
            if self._rare_keys_left < 0:
                raise PickleError(f"its pickle has more than {_MAX_RARE_KEYS} keys that are neither text nor integers")

    # Memo

    @_opcode(b"h")
    def _get1(self) -> None:
        self._stack.append(self._memo[self._read(1)[0]])

    @_opcode(b"j")
    def _get4(self) -> None:
        self._stack.append(self._memo[self._size(4)])

    @_opcode(b"q")
    def _put1(self) -> None:
        self._put(self._read(1)[0])

    @_opcode(b"r")
    def _put4(self) -> None:
        self._put(self._size(4))

    @_opcode(b"\x94")
    def _memoize(self) -> None:
        self._memo.append(self._stack[-1])

    def _put(self, index: int) -> None:
        """Picklers number what they memoize; Python 2's began at 1."""
        if index == 1 and not self._memo:
            self._memo.append(None)
        expected = len(self._memo)
        if index == expected:
            self._memo.append(self._stack[-1])
        elif index < expected:
            self._memo[index] = self._stack[-1]
        else:
            raise PickleError(f"its pickle has the memo index {index}, expected at most {expected}")

    # Objects

    @_opcode(b"c")
    def _global(self) -> None:
        module, name = (self._readline(_MAX_NAME_LENGTH + 1).decode() for _ in range(2))
        if not (module.endswith("\n") and name.endswith("\n")):
            raise PickleError("its pickle names a class by what is not a name")
        self._push_name(module[:-1], name[:-1])

    @_opcode(b"\x93")
    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if type(name) is not str or type(module) is not str or max(len(name), len(module)) > _MAX_NAME_LENGTH:
            raise PickleError("its pickle names a class by what is not a name")
        self._push_name(module, name)

    def _push_name(self, module: str, name: str) -> None:
        self._spend(_LIST_BYTES)
        value = self._values.get((module, name))
        self._stack.append(Reference(module, name) if value is None else value)

    @_opcode(b"Q")
    def _persistent_id(self) -> None:
        self._spend(_CALL_BYTES)
        self._stack.append(self._persistent_load(self._stack.pop()))

    @_opcode(b"R")
    def _reduce(self) -> None:
        args, function = self._stack.pop(), self._stack.pop()
        if type(args) is not tuple:
            raise PickleError("its pickle calls a function with what is no tuple of arguments")
        if type(function) is Reference:
            call = self._calls.get((function.module, function.name))
            value = Stub(sys.intern(str(function)), args) if call is None else call(*args)
        elif type(function) is Stub:
            value = Stub(function.name, (function, *args))
        else:
            _refuse("calls", function)
        self._push_object(value)

    @_opcode(b"\x81")
    def _new_object(self) -> None:
        args, cls = self._stack.pop(), self._stack.pop()
        self._push_new(cls, args)

    @_opcode(b"\x92")
    def _new_object_with_keywords(self) -> None:
        keywords, args, cls = self._stack.pop(), self._stack.pop(), self._stack.pop()
        self._push_new(cls, (*args, keywords))

    def _push_new(self, cls: Any, args: Any) -> None:
        if type(cls) is not Reference or type(args) is not tuple:
            _refuse("makes an object of", cls)
        self._push_object(Stub(sys.intern(str(cls)), args))

    def _push_object(self, value: Any) -> None:
        kind = type(value)
        self._spend(_STUB_BYTES if kind is Stub else _TUPLE_BYTES if kind is tuple else _CALL_BYTES)
        if kind is Stub:
            self._stubs.append(value)
        self._stack.append(value)

    @_opcode(b"b")
    def _build(self) -> None:
        """A dict may have attributes too (``_metadata`` of a state dict): they are left out."""
        state = self._stack.pop()
        target = self._stack[-1]
        if type(target) is Stub:
            target.state = state
        elif type(target) is not dict:
            _refuse("sets attributes of", target)

    # Calls that stand for plain data, where protocol 2 has no opcode

    def _plain_calls(self) -> dict[tuple[str, str], Callable[..., Any]]:
        calls: dict[tuple[str, str], Callable[..., Any]] = {
            ("_codecs", "encode"): self._encoded,
            ("collections", "OrderedDict"): self._ordered_dict,
            ("collections", "defaultdict"): lambda factory=None: {},
        }
        for module in ("builtins", "__builtin__"):
            calls[module, "bytes"] = lambda: b""
            calls[module, "set"] = lambda items=(): set(self._keys(items))
            calls[module, "frozenset"] = lambda items=(): frozenset(self._keys(items))
        return calls

    def _encoded(self, text: str, encoding: str) -> bytes:
        """Protocol 2 writes bytes as the text that Latin-1 encodes to them."""
        if encoding not in ("latin1", "latin-1"):
            raise PickleError("its pickle encodes text in another way than bytes are saved")
        self._spend(len(text))
        return text.encode("latin-1")

    def _ordered_dict(self, pairs: Iterable[tuple[Any, Any]] = ()) -> dict[Any, Any]:
        pairs = [(key, value) for key, value in pairs]
        self._keys(key for key, _ in pairs)
        return dict(pairs)


def _check_walks(roots: list[Any]) -> None:
    """Refuse containers that hold themselves, or that are too deep or, each reference counted, too large to walk.

    A stub is a leaf: the objects of a program may well form cycles.
    """
    measures: dict[int, tuple[int, int] | None] = {}
    pending = [(root, False) for root in reversed(roots) if type(root) in _CONTAINERS]
    while pending:
        node, is_measured = pending.pop()
        children = [child for child in _elements(node) if type(child) in _CONTAINERS]
        if is_measured:
            measures[id(node)] = _measure(node, [measures[id(child)] for child in children])
        elif id(node) not in measures:
            measures[id(node)] = None
            pending.append((node, True))
            pending.extend((child, False) for child in children)
        elif measures[id(node)] is None:
            raise PickleError("its pickle has a container that holds itself")


def _elements(node: Any) -> Iterable[Any]:
    return node.values() if type(node) is dict else node


def _measure(node: Any, children: list[tuple[int, int] | None]) -> tuple[int, int]:
    """Number of nodes and depth of ``node``, from those of the containers in it."""
    nodes, depth = 1 + len(node), 1
    for child in children:
        assert child is not None
        nodes, depth = nodes + child[0], max(depth, 1 + child[1])
    if nodes > MAX_NODES or depth > MAX_DEPTH:
        raise PickleError(f"its pickle has a container {depth} levels deep, with {nodes} values in all")
    return nodes, depth


def _refuse(action: str, target: object) -> NoReturn:
    raise PickleError(f"its pickle {action} a {type(target).__name__}, which plain data does not need")


def _refuse_opcode(code: bytes) -> NoReturn:
    if not code:
        raise PickleError("its pickle was cut short")
    raise PickleError(f"its pickle has the opcode {code!r}, which torch.save does not write")
