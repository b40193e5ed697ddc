"""Reading a pickle without running it.

A pickle is a program for a small stack machine, and the standard machine imports and calls whatever
the program names. This one has the same opcodes but makes only plain values: the few globals that it
is given beforehand mean something, every other one becomes an :class:`Inert` value that swallows what
is done to it. Nothing is imported, and no method of any object from the file is called.

It is also sparing: text, numbers and objects are charged against an allowance that grows with the bytes
read, so that a small file cannot ask for a large amount of memory; and it never recurses, compares or
hashes anything but strings, so that deep nesting is harmless.
"""

from __future__ import annotations

import struct
from typing import Any, BinaryIO, Callable, Mapping

from modelscope_i2v.errors import CheckpointError

MAX_PICKLE_BYTES = 32 * 2**20  # a checkpoint's pickle takes about 200 bytes per tensor
MAX_NAME_BYTES = 256
MAX_NUMBER_BYTES = 1024
MAX_LINE_BYTES = 2**16

# The allowance: a checkpoint's pickle costs 25 to 50 bytes of memory for each of its own by the figures
# below, which are upper bounds of what CPython takes.
ALLOWANCE_BYTES = 8 * 2**20
ALLOWANCE_PER_BYTE_READ = 64
COST_OF_SLOT = 16
COST_OF_NUMBER = 32
COST_OF_VALUE = 64
COST_OF_CONTAINER = 96
COST_OF_ENTRY = 128
COST_OF_RECORD = 192


class Inert:
    """Stands for an object that could only be made by running something; ``name`` is what."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class RestrictedUnpickler:
    """Reads one pickle from where ``file`` stands, taking ``limit`` bytes at most.

    Args:
        file: a binary file; after :meth:`load` it stands just behind the pickle.
        limit: how many bytes the pickle may have.
        known: what the globals that mean something stand for, by (module, name): a function, which gets
            the tuple of arguments when the pickle calls it, or a plain value. The functions must accept
            arguments of any kind and number and make a :class:`CheckpointError` of bad ones.
        persistent_load: what a persistent id stands for; called like the functions of ``known``.
    """

    def __init__(
        self,
        file: BinaryIO,
        limit: int,
        known: Mapping[tuple[str, str], Any],
        persistent_load: Callable[[tuple], Any],
    ) -> None:
        self._file = file
        self._limit = min(limit, MAX_PICKLE_BYTES)
        self._taken = 0
        self._spent = 0
        self._known = known
        self._persistent_load = persistent_load
        self._stack: list[Any] = []
        self._outer_stacks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def load(self) -> Any:
        """The pickled value, of dict, list, tuple, str, bytes, numbers, None, Inert and known things."""
        while True:
            opcode = self._take(1)
            if opcode == b".":
                return self._pop()
            operation = _OPERATIONS.get(opcode)
            if operation is None:
                raise CheckpointError(f"its pickle holds the opcode {opcode!r}, which no checkpoint needs")
            operation(self, opcode)

    # Input and memory, both bounded.

    def _take(self, count: int) -> bytes:
        if count > self._limit - self._taken:
            raise CheckpointError("its pickle is cut short, or is longer than any checkpoint's")
        data = self._file.read(count)
        if len(data) != count:
            raise CheckpointError("its pickle is cut short")
        self._taken += count
        return data

    def _take_number(self, layout: struct.Struct) -> Any:
        return layout.unpack(self._take(layout.size))[0]

    def _take_line(self, limit: int) -> bytes:
        line = self._file.readline(min(limit + 1, self._limit - self._taken))
        self._taken += len(line)
        if not line.endswith(b"\n"):
            raise CheckpointError("its pickle holds a line that has no end")
        return line[:-1]

    def _charge(self, cost: int) -> None:
        self._spent += cost
        if self._spent > ALLOWANCE_BYTES + ALLOWANCE_PER_BYTE_READ * self._taken:
            raise CheckpointError("its pickle asks for far more memory than it has bytes")

    def _push(self, value: Any, cost: int = 0) -> None:
        self._charge(cost + COST_OF_SLOT)
        self._stack.append(value)

    def _pop(self) -> Any:
        if not self._stack:
            raise CheckpointError("its pickle is damaged: it takes a value where there is none")
        return self._stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        if not self._outer_stacks:
            raise CheckpointError("its pickle is damaged: it takes values where there are none")
        items, self._stack = self._stack, self._outer_stacks.pop()
        return items

    # Numbers and text.

    def _constant(self, opcode: bytes) -> None:
        self._push(_CONSTANTS[opcode])

    def _number(self, opcode: bytes) -> None:
        self._push(self._take_number(_NUMBERS[opcode]), COST_OF_NUMBER)

    def _long(self, opcode: bytes) -> None:
        count = self._take_number(_LONGS[opcode])
        if count > MAX_NUMBER_BYTES:
            raise CheckpointError(f"its pickle holds a number of {count} bytes")
        self._push(int.from_bytes(self._take(count), "little", signed=True), COST_OF_VALUE + 2 * count)

    def _number_in_words(self, opcode: bytes) -> None:
        line = self._take_line(MAX_NUMBER_BYTES)
        if opcode == b"I" and line in (b"00", b"01"):
            self._push(line == b"01")
            return
        try:
            value = float(line) if opcode == b"F" else int(line.rstrip(b"L"))
        except ValueError:
            raise CheckpointError("its pickle holds a number that is none") from None
        self._push(value, COST_OF_VALUE + len(line))

    def _bytes(self, opcode: bytes) -> None:
        data = self._take(self._take_number(_BYTES[opcode]))
        self._push(data, COST_OF_VALUE + len(data))

    def _text(self, opcode: bytes) -> None:
        data = self._take(self._take_number(_TEXTS[opcode]))
        self._charge(COST_OF_VALUE + 4 * len(data))  # before decoding: one character of four bytes widens all
        try:
            self._push(data.decode("utf-8", "surrogatepass"))
        except UnicodeDecodeError:
            self._push(data)  # a byte string of Python 2, whose text has the same opcode

    def _text_line(self, opcode: bytes) -> None:
        # Protocol 0 cannot carry tensors, so what such a line says is of no use to anyone.
        self._take_line(MAX_LINE_BYTES)
        self._push(_TEXT_LINE)

    # Containers.

    def _mark(self, opcode: bytes) -> None:
        self._charge(COST_OF_CONTAINER)
        self._outer_stacks.append(self._stack)
        self._stack = []

    def _pop_or_unmark(self, opcode: bytes) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._pop_to_mark()

    def _drop_to_mark(self, opcode: bytes) -> None:
        self._pop_to_mark()

    def _duplicate(self, opcode: bytes) -> None:
        top = self._pop()
        self._push(top)
        self._push(top)

    def _empty(self, opcode: bytes) -> None:
        self._push([] if opcode == b"]" else {}, COST_OF_CONTAINER)

    def _tuple(self, opcode: bytes) -> None:
        if opcode == b"t":
            items = self._pop_to_mark()
        else:
            items = [self._pop() for _ in range(_SHORT_TUPLES[opcode])][::-1]
        self._push(tuple(items), COST_OF_VALUE + COST_OF_SLOT * len(items))

    def _list_of_marked(self, opcode: bytes) -> None:
        items = self._pop_to_mark()
        self._push(items, COST_OF_CONTAINER)

    def _dict_of_marked(self, opcode: bytes) -> None:
        items = self._pop_to_mark()
        self._push({}, COST_OF_CONTAINER)
        self._set_items(items)

    def _set_of_marked(self, opcode: bytes) -> None:
        self._pop_to_mark()
        self._push(_SET)

    def _append(self, opcode: bytes) -> None:
        self._extend([self._pop()] if opcode == b"a" else self._pop_to_mark())

    def _extend(self, items: list[Any]) -> None:
        target = self._top()
        if isinstance(target, list):
            self._charge(COST_OF_SLOT * len(items))
            target.extend(items)
        elif not isinstance(target, Inert):
            raise CheckpointError("its pickle is damaged: it appends to what is no list")

    def _set_item(self, opcode: bytes) -> None:
        value = self._pop()
        self._set_items([self._pop(), value])

    def _set_marked_items(self, opcode: bytes) -> None:
        self._set_items(self._pop_to_mark())

    def _set_items(self, items: list[Any]) -> None:
        target = self._top()
        if len(items) % 2 or not isinstance(target, (dict, Inert)):
            raise CheckpointError("its pickle is damaged: it sets items of what is no dict")
        if isinstance(target, Inert):
            return
        self._charge(COST_OF_ENTRY * len(items) // 2)
        for key, value in zip(items[::2], items[1::2]):
            # No parameter has a name of another type, and hashing what a stranger nested is not safe.
            if type(key) is str:
                target[key] = value

    def _top(self) -> Any:
        top = self._pop()
        self._stack.append(top)
        return top

    # The memo: values to be used again.

    def _memoize(self, opcode: bytes) -> None:
        if opcode == b"p":
            index = self._index_in_words()
        else:
            index = self._take_number(_INDICES[opcode]) if opcode in _INDICES else len(self._memo)
        self._charge(COST_OF_ENTRY)
        self._memo[index] = self._top()

    def _recall(self, opcode: bytes) -> None:
        index = self._index_in_words() if opcode == b"g" else self._take_number(_INDICES[opcode])
        if index not in self._memo:
            raise CheckpointError("its pickle is damaged: it recalls a value that it has not kept")
        self._push(self._memo[index])

    def _index_in_words(self) -> int:
        line = self._take_line(16)
        if not line.isdigit():
            raise CheckpointError("its pickle is damaged: an index is no number")
        return int(line)

    # What an ordinary unpickler would import, construct and call.

    def _global(self, opcode: bytes) -> None:
        if opcode == b"c":
            self._push_global(self._name_line(), self._name_line())
        else:
            name = self._pop()
            self._push_global(self._pop(), name)

    def _name_line(self) -> str:
        return self._take_line(MAX_NAME_BYTES).decode("utf-8", "replace")

    def _push_global(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise CheckpointError("its pickle is damaged: a name is no text")
        if len(module) > MAX_NAME_BYTES or len(name) > MAX_NAME_BYTES:
            raise CheckpointError("its pickle holds a name longer than any real one")
        if (module, name) in self._known:
            self._push(self._known[module, name])
        else:
            self._push(Inert(f"{module}.{name}"), COST_OF_VALUE + 4 * (len(module) + len(name)))

    def _call(self, opcode: bytes) -> None:
        if opcode == b"\x92":
            self._pop()  # keyword arguments, which no known function has
        arguments = self._pop()
        self._push_result(self._pop(), arguments)

    def _call_marked(self, opcode: bytes) -> None:
        if opcode == b"i":
            self._push_global(self._name_line(), self._name_line())
            function = self._pop()
            items = self._pop_to_mark()
        else:
            items = self._pop_to_mark()
            if not items:
                raise CheckpointError("its pickle is damaged: it constructs nothing")
            function = items.pop(0)
        self._push_result(function, tuple(items))

    def _push_result(self, function: Any, arguments: Any) -> None:
        if not isinstance(arguments, tuple):
            arguments = (arguments,)
        if isinstance(function, Inert):
            self._push(function)
        elif callable(function):  # then it is one of self._known: nothing else here can be called
            self._push(function(arguments), COST_OF_RECORD)
        else:
            raise CheckpointError("its pickle is damaged: it calls what is no function")

    def _build(self, opcode: bytes) -> None:
        self._pop()  # the state, for a __setstate__ that is not called
        self._top()

    def _persistent(self, opcode: bytes) -> None:
        identity = self._pop()
        if not isinstance(identity, tuple):
            raise CheckpointError("its pickle is damaged: a storage's description is no tuple")
        self._push(self._persistent_load(identity), COST_OF_RECORD)

    # What says something about the pickle itself.

    def _protocol(self, opcode: bytes) -> None:
        protocol = self._take(1)[0]
        if protocol > 5:
            raise CheckpointError(f"its pickle is of protocol {protocol}; known are those up to 5")

    def _frame(self, opcode: bytes) -> None:
        self._take(8)  # a hint for reading ahead, which the file does already


_SET = Inert("set")
_TEXT_LINE = Inert("str")

_CONSTANTS: dict[bytes, Any] = {b"N": None, b"\x88": True, b"\x89": False, b")": (), b"\x8f": _SET}
_UINT8, _UINT16, _UINT32, _UINT64 = (struct.Struct(layout) for layout in ("<B", "<H", "<I", "<Q"))
_NUMBERS = {b"K": _UINT8, b"M": _UINT16, b"J": struct.Struct("<i"), b"G": struct.Struct(">d")}
_LONGS = {b"\x8a": _UINT8, b"\x8b": _UINT32}
_BYTES = {b"C": _UINT8, b"B": _UINT32, b"\x8e": _UINT64, b"\x96": _UINT64}
_TEXTS = {b"\x8c": _UINT8, b"X": _UINT32, b"\x8d": _UINT64, b"U": _UINT8, b"T": _UINT32}
_INDICES = {b"q": _UINT8, b"r": _UINT32, b"h": _UINT8, b"j": _UINT32}
_SHORT_TUPLES = {b"\x85": 1, b"\x86": 2, b"\x87": 3}

_OPERATIONS: dict[bytes, Callable[[RestrictedUnpickler, bytes], None]] = {
    **dict.fromkeys(_CONSTANTS, RestrictedUnpickler._constant),
    **dict.fromkeys(_NUMBERS, RestrictedUnpickler._number),
    **dict.fromkeys(_LONGS, RestrictedUnpickler._long),
    **dict.fromkeys((b"I", b"L", b"F"), RestrictedUnpickler._number_in_words),
    **dict.fromkeys(_BYTES, RestrictedUnpickler._bytes),
    **dict.fromkeys(_TEXTS, RestrictedUnpickler._text),
    **dict.fromkeys((b"S", b"V"), RestrictedUnpickler._text_line),
    b"(": RestrictedUnpickler._mark,
    b"0": RestrictedUnpickler._pop_or_unmark,
    b"1": RestrictedUnpickler._drop_to_mark,
    b"2": RestrictedUnpickler._duplicate,
    **dict.fromkeys((b"]", b"}"), RestrictedUnpickler._empty),
    **dict.fromkeys((b"t", *_SHORT_TUPLES), RestrictedUnpickler._tuple),
    b"l": RestrictedUnpickler._list_of_marked,
    b"d": RestrictedUnpickler._dict_of_marked,
    b"\x91": RestrictedUnpickler._set_of_marked,
    **dict.fromkeys((b"a", b"e", b"\x90"), RestrictedUnpickler._append),
    b"s": RestrictedUnpickler._set_item,
    b"u": RestrictedUnpickler._set_marked_items,
    **dict.fromkeys((b"q", b"r", b"p", b"\x94"), RestrictedUnpickler._memoize),
    **dict.fromkeys((b"h", b"j", b"g"), RestrictedUnpickler._recall),
    **dict.fromkeys((b"c", b"\x93"), RestrictedUnpickler._global),
    **dict.fromkeys((b"R", b"\x81", b"\x92"), RestrictedUnpickler._call),
    **dict.fromkeys((b"i", b"o"), RestrictedUnpickler._call_marked),
    b"b": RestrictedUnpickler._build,
    b"Q": RestrictedUnpickler._persistent,
    b"\x80": RestrictedUnpickler._protocol,
    b"\x95": RestrictedUnpickler._frame,
}
