"""Descriptions of tensors that lie in a file, and how a torch checkpoint's pickle spells them.

The functions in :data:`TORCH_GLOBALS` stand for the few of torch's own that ``torch.save`` makes a pickle
call. They describe tensors instead of making them, and check that each lies within its storage.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, Callable, Iterable

import torch

from modelscope_i2v.errors import CheckpointError
from modelscope_i2v.weights.restricted_unpickler import Inert

MAX_DIMENSIONS = 64
MAX_INTEGER = 2**63 - 1


def _existing_dtypes(names: str) -> dict[str, torch.dtype]:
    """The dtypes that the installed torch has, by name; the float8 ones came one after the other."""
    return {name: getattr(torch, name) for name in names.split() if hasattr(torch, name)}


DTYPES = _existing_dtypes(
    "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 uint16 uint32 uint64 bool complex32"
    " complex64 complex128 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu"
)


@dataclass(frozen=True)
class StorageType:
    """A storage class as a pickle names it: of one dtype, or untyped (bytes, whose tensor has the dtype)."""

    dtype: torch.dtype


@dataclass(frozen=True)
class Storage:
    """A run of bytes that one or more tensors view; ``key`` is its name in the file."""

    __slots__ = ("key", "dtype", "nbytes")  # a small pickle can describe very many
    key: str
    dtype: torch.dtype
    nbytes: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: ``shape``, ``stride`` and ``offset`` (in elements) within its storage."""

    __slots__ = ("dtype", "shape", "stride", "offset", "storage")
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    storage: Storage

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def span(self) -> int:
        """How many elements of the storage lie between its first and its last, with these two."""
        if self.numel == 0:
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride))


def describe_tensor(
    storage: Storage, dtype: torch.dtype, offset: Any, shape: Any, stride: Any
) -> StoredTensor:
    """A checked :class:`StoredTensor`, of values that may be anything."""
    if not (_are_sizes([offset]) and _is_size_tuple(shape) and _is_size_tuple(stride)):
        raise CheckpointError("it holds a tensor whose size, stride or offset are no sizes")
    tensor = StoredTensor(dtype, shape, stride, offset, storage)
    if len(shape) != len(stride) or (offset + tensor.span) * dtype.itemsize > storage.nbytes:
        raise CheckpointError(
            f"it holds a tensor of shape {list(shape)}, strides {list(stride)} and offset {offset} that"
            f" reaches beyond its storage of {storage.nbytes} bytes"
        )
    return tensor


def _is_size_tuple(values: Any) -> bool:
    return isinstance(values, tuple) and len(values) <= MAX_DIMENSIONS and _are_sizes(values)


def _are_sizes(values: Iterable[Any]) -> bool:
    return all(type(value) is int and 0 <= value <= MAX_INTEGER for value in values)


def describe_storage(identity: tuple) -> Storage:
    """The storage that a persistent id of ``torch.save`` claims, in either of its formats."""
    kind, *fields = identity if identity else (None,)
    if kind != "storage" or len(fields) not in (4, 5):
        raise CheckpointError("it holds a pickled module with its source code instead of plain tensors")
    storage_type, key, _, count = fields[:4]
    # The last field is None but for views of a storage, which torch stopped writing before version 0.4.
    if not isinstance(storage_type, StorageType) or fields[4:] not in ([], [None]):
        raise CheckpointError("it holds a storage of a kind that is not known")
    if not isinstance(key, str) or not _are_sizes([count]):
        raise CheckpointError("it holds a storage whose name or size is none")
    return Storage(key, storage_type.dtype, count * storage_type.dtype.itemsize)


def _rebuild_tensor(arguments: tuple) -> StoredTensor | Inert:
    """``torch._utils._rebuild_tensor`` and ``_v2``: the dtype is the storage's."""
    if len(arguments) < 4 or not isinstance(arguments[0], Storage):
        return Inert("torch._utils._rebuild_tensor of no storage")
    if any(arguments[6:7]):
        return Inert("a tensor that is to be conjugated or negated")
    storage, offset, shape, stride = arguments[:4]
    return describe_tensor(storage, storage.dtype, offset, shape, stride)


def _rebuild_tensor_v3(arguments: tuple) -> StoredTensor | Inert:
    """``torch._utils._rebuild_tensor_v3``: of an untyped storage, with a dtype of its own."""
    if len(arguments) < 7 or not isinstance(arguments[0], Storage):
        return Inert("torch._utils._rebuild_tensor_v3 of no storage")
    storage, offset, shape, stride, _, _, dtype = arguments[:7]
    if not isinstance(dtype, torch.dtype) or any(arguments[7:8]):
        return Inert("a tensor of unknown dtype, or to be conjugated or negated")
    return describe_tensor(storage, dtype, offset, shape, stride)


def _rebuild_parameter(arguments: tuple) -> StoredTensor | Inert:
    """``torch._utils._rebuild_parameter`` and ``_with_state``: the tensor; what else it had is dropped."""
    if arguments and isinstance(arguments[0], StoredTensor):
        return arguments[0]
    return Inert("torch._utils._rebuild_parameter of no tensor")


def _ordered_dict(arguments: tuple) -> dict | Inert:
    return Inert("collections.OrderedDict with arguments") if arguments else {}


def _size(arguments: tuple) -> tuple | Inert:
    """``torch.Size``: the tuple that it is given."""
    if len(arguments) == 1 and isinstance(arguments[0], tuple):
        return arguments[0]
    return Inert("torch.Size of no tuple")


_STORAGE_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "uint8",
}

_REBUILDERS: dict[str, Callable[[tuple], Any]] = {
    "_rebuild_tensor": _rebuild_tensor,
    "_rebuild_tensor_v2": _rebuild_tensor,
    "_rebuild_tensor_v3": _rebuild_tensor_v3,
    "_rebuild_parameter": _rebuild_parameter,
    "_rebuild_parameter_with_state": _rebuild_parameter,
}

#: All that a checkpoint's pickle can name with an effect, by module and name.
TORCH_GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("torch", "Size"): _size,
    **{("torch._utils", name): rebuild for name, rebuild in _REBUILDERS.items()},
    **{("torch", name): dtype for name, dtype in DTYPES.items()},
    **{
        (module, name): StorageType(DTYPES[dtype])
        for name, dtype in _STORAGE_DTYPES.items()
        for module in ("torch", "torch.cuda", "torch.storage")
    },
}
