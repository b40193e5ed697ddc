"""Reading the pickle of a torch checkpoint without running what it says.

``torch.load(weights_only=True)`` is not used: it refuses the published autoencoder's file, which pickles
foreign classes, and crafted files have run code through it twice (CVE-2025-32434, fixed in torch 2.6, and
CVE-2026-24747, fixed in 2.10), while older versions of torch are supported here. The standard unpickler makes
whatever ``find_class`` and ``persistent_load`` return, and here that is only descriptions of tensors and
:class:`Inert` values: nothing is imported, and nothing that a file can reach has an effect when it is called,
filled or given a state. :func:`_check_opcodes` closes what is left: the registry of ``copyreg`` extensions,
and pickles that take far more memory or time than they have bytes.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from dataclasses import dataclass
from math import prod
from typing import Any, Callable, NamedTuple

import torch

from ..errors import CheckpointError

MAX_OPCODES = 2**20  # some 32 for each tensor; each takes 300 bytes of memory at most
MAX_TUPLE = 1000  # entries, those of its entries included: hashing a key takes as many calls in each other
MAX_FOREIGN_NAMES = 1000

# What picklers write for protocols 2 to 5. The others are of older protocols, or for cyclic tuples.
_OPCODES = frozenset(
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT BINUNICODE"
    " SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 EMPTY_TUPLE TUPLE TUPLE1"
    " TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS EMPTY_SET ADDITEMS FROZENSET"
    " GLOBAL STACK_GLOBAL REDUCE NEWOBJ NEWOBJ_EX BUILD BINPERSID BINPUT LONG_BINPUT MEMOIZE BINGET"
    " LONG_BINGET".split()
)


class Storage(NamedTuple):
    """A run of bytes in the file that one or more tensors view; ``key`` is its name there."""

    key: str
    dtype: torch.dtype
    nbytes: int


class StoredTensor(NamedTuple):
    """A tensor in a file: ``shape``, ``stride`` and ``offset`` (in elements) within its storage."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    storage: Storage

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def span(self) -> int:
        """Elements of the storage from the tensor's first to its last."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride))


class Inert:
    """Stands for an object that could only be made by running code; each foreign name has a subclass.

    It can be made of anything, called, filled with anything and given any state, and keeps nothing of it.
    """

    __slots__ = ()
    name = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        return super().__new__(cls)

    def __call__(self, *args: Any) -> Inert:
        return self

    def _ignore(self, *args: Any) -> None:
        """Do nothing."""

    __setstate__ = __setitem__ = append = extend = add = _ignore


@dataclass(frozen=True)  # a file's BUILD opcode cannot set anything on it
class _Function:
    __slots__ = ("call",)
    call: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)


class _OrderedDict(dict):
    """A dict that ignores the state (a state dict's ``_metadata``) which torch pickles with it."""

    __slots__ = ()

    def __init__(self, *args: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        """Do nothing."""


def describe_tensor(storage: Any, offset: Any, shape: Any, stride: Any, dtype: Any = None) -> StoredTensor:
    """Return a checked description of a tensor, of values that may be anything."""
    dtype = dtype or storage.dtype
    sizes = (*shape, *stride) if isinstance(shape, tuple) and isinstance(stride, tuple) else (None,)
    if not _are_sizes(offset, *sizes) or len(shape) != len(stride) or len(shape) > 64:
        raise CheckpointError("it holds a tensor whose size, stride or offset are no sizes")
    tensor = StoredTensor(dtype, shape, stride, offset, storage)
    if (offset + tensor.span) * dtype.itemsize > storage.nbytes:
        raise CheckpointError(
            f"it holds a tensor of shape {list(shape)}, strides {list(stride)} and offset {offset} that"
            f" reaches beyond its storage of {storage.nbytes} bytes"
        )
    return tensor


def _are_sizes(*values: Any) -> bool:
    return all(type(value) is int and 0 <= value < 2**63 for value in values)


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> Any:
    """Stand in for ``torch._utils._rebuild_tensor``, ``_v2`` and ``_v3``, which names the dtype."""
    metadata = rest[2:]  # behind requires_grad and hooks
    dtype = metadata[0] if metadata and isinstance(metadata[0], torch.dtype) else None
    if any(metadata[1:] if dtype else metadata):  # to be conjugated or negated
        return _foreign("torch._utils._rebuild_tensor with metadata")()
    return describe_tensor(storage, offset, shape, stride, dtype)


def _rebuild_parameter(data: Any, *rest: Any) -> Any:
    """Stand in for ``torch._utils._rebuild_parameter`` and ``_with_state``: the tensor alone."""
    return data


def _foreign(name: str) -> type[Inert]:
    return type("Inert", (Inert,), {"__slots__": (), "name": name})


#: Dtypes by torch's names for them.
DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}

_STORAGE_DTYPES = dict(
    Double="float64", Float="float32", Half="float16", BFloat16="bfloat16", Long="int64", Int="int32",
    Short="int16", Char="int8", Byte="uint8", Bool="bool", ComplexFloat="complex64",
    ComplexDouble="complex128", Untyped="uint8",
)  # fmt: skip

#: All that a checkpoint's pickle can name and get; storage types are dtypes here.
_KNOWN: dict[str, Any] = {
    "collections.OrderedDict": _Function(_OrderedDict),
    **{
        f"torch._utils._rebuild_tensor{version}": _Function(_rebuild_tensor) for version in ("", "_v2", "_v3")
    },
    "torch._utils._rebuild_parameter": _Function(_rebuild_parameter),
    "torch._utils._rebuild_parameter_with_state": _Function(_rebuild_parameter),
    **{f"torch.{name}": dtype for name, dtype in DTYPES.items()},
    **{
        f"{module}.{kind}Storage": DTYPES[dtype]
        for kind, dtype in _STORAGE_DTYPES.items()
        for module in ("torch", "torch.cuda", "torch.storage")
    },
}


def read_pickle(data: bytes, check_storage: Callable[[Storage], None]) -> Any:
    """Return what a torch checkpoint's pickle holds: plain values, stored tensors and inert ones.

    Args:
        data: the pickle.
        check_storage: called with each storage that the pickle names; raises where the file has another one.

    Raises:
        CheckpointError: the pickle holds what no checkpoint does. A damaged one raises anything whatever.
    """
    _check_opcodes(data)
    return _Unpickler(data, check_storage).load()


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, check_storage: Callable[[Storage], None]) -> None:
        super().__init__(io.BytesIO(data))
        self._check_storage = check_storage
        self._foreign: dict[str, type[Inert]] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a global; nothing is imported."""
        full_name = f"{module}.{name}"[:256]
        if full_name in _KNOWN:
            return _KNOWN[full_name]
        if full_name not in self._foreign:
            if len(self._foreign) == MAX_FOREIGN_NAMES:
                raise CheckpointError(f"its pickle names more than {MAX_FOREIGN_NAMES} foreign classes")
            self._foreign[full_name] = _foreign(full_name)
        return self._foreign[full_name]

    def persistent_load(self, pid: Any) -> Storage:
        """Return the description of a storage: ("storage", dtype, key, device, number of elements)."""
        if not isinstance(pid, tuple) or len(pid) != 5 or not isinstance(pid[1], torch.dtype):
            raise CheckpointError("it holds a storage of a kind that is not known")
        _, dtype, key, _, count = pid
        if not isinstance(key, str) or not _are_sizes(count):
            raise CheckpointError("it holds a storage whose name or size is none")
        storage = Storage(key, dtype, count * dtype.itemsize)
        self._check_storage(storage)
        return storage


def _check_opcodes(data: bytes) -> None:
    """Raise for opcodes that no checkpoint needs, and for bombs.

    What each value is made of is counted along the stack: a tuple of tuples of tuples that share their
    entries is small to store, and takes for ever to hash when it is a key.
    """
    stack: list[int] = []  # how many values each is made of
    marks: list[int] = []
    memo: dict[Any, int] = {}
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        name, before = opcode.name, opcode.stack_before
        if name not in _OPCODES or count == MAX_OPCODES:
            fault = f"more than {count:,} opcodes" if name in _OPCODES else f"the opcode {name}"
            raise CheckpointError(f"its pickle holds {fault}, which no checkpoint needs")
        if name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            index = len(memo) if argument is None else argument
            if index > len(data):  # the unpickler's memo is a list
                raise CheckpointError("its pickle keeps a value under a number that is far too large")
            memo[index] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MARK":
            marks.append(len(stack))
        elif (
            pickletools.markobject in before[1:]
        ):  # a list, dict or set takes what lies on the mark, and stays
            del stack[marks.pop() :]
        else:
            start = marks.pop() if before[:1] == [pickletools.markobject] else len(stack) - len(before)
            size = 1 + sum(stack[start:])
            if size > MAX_TUPLE:
                raise CheckpointError(f"its pickle holds a tuple of more than {MAX_TUPLE} entries")
            del stack[start:]
            stack += [size] * len(opcode.stack_after)
