"""The formats that weights come in: torch's zip archive, torch's older format, and safetensors.

Each reader gives the file's state dict with descriptions of the tensors in place of tensors, and a function
that finds a storage's bytes. The format is told by the file's content; a file that has none of them gets
an error that says what it looks like. Torch files are little-endian, as is every machine this runs on.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any, BinaryIO, Callable, NamedTuple

from modelscope_i2v.errors import CheckpointError
from modelscope_i2v.weights.restricted_unpickler import MAX_PICKLE_BYTES, Inert, RestrictedUnpickler
from modelscope_i2v.weights.stored_tensors import (
    DTYPES,
    TORCH_GLOBALS,
    Storage,
    StoredTensor,
    describe_storage,
    describe_tensor,
)
from modelscope_i2v.weights.zip_members import find_data, read_members

MAX_SAFETENSORS_HEADER_BYTES = 32 * 2**20

_LEGACY_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL_VERSION = 1001

#: Torch's names of what a safetensors file calls a dtype.
SAFETENSORS_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
}


class Contents(NamedTuple):
    """What a file holds: its values by key, and where a storage's bytes begin."""

    state: dict[str, Any]
    locate: Callable[[Storage], int]


def read_contents(file: BinaryIO) -> Contents:
    """The state dict in ``file``, whichever format it has."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(1024)
    file.seek(0)
    # Safetensors first: the length that it begins with may look like the other signatures.
    if head[5:9] == b"\0\0\0{":
        return _read_safetensors(file, size)
    if head.startswith(b"PK\x03\x04"):
        return _read_zip(file)
    if head.startswith(b"\x80"):
        return _read_legacy(file, size)
    raise CheckpointError(_describe_foreign(head, size))


# Torch's zip archive.


def _read_zip(file: BinaryIO) -> Contents:
    members = read_members(file)
    pickles = [name for name in members if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(pickles) != 1:
        raise CheckpointError(
            f"it is a zip archive but no checkpoint: it holds {quote_some(members)};"
            " if the weights file is in it, unpack it first"
        )
    folder = pickles[0].partition("/")[0]
    if f"{folder}/constants.pkl" in members:
        raise CheckpointError(
            "it is a TorchScript archive (torch.jit.save), a program rather than a state dict;"
            " use the model's own weights file, or torch.save(torch.jit.load(file).state_dict(), other_file)"
        )
    compressed = [name for name, member in members.items() if not member.plain]
    if compressed:
        raise CheckpointError(
            f"its members {quote_some(compressed)} are compressed or encrypted, which torch.save never does;"
            " if someone packed it again, unpack it and zip it with no compression"
        )
    order = members.get(f"{folder}/byteorder")
    if order is not None:
        file.seek(find_data(file, order))
        if file.read(min(order.size, 16)) != b"little":
            raise CheckpointError("it was written on a big-endian machine; save it again on a usual one")

    def load_storage(identity: tuple) -> Storage:
        storage = describe_storage(identity)
        member = members.get(f"{folder}/data/{storage.key}")
        if member is None or member.size != storage.nbytes:
            found = "is not there" if member is None else f"has {member.size} bytes"
            raise CheckpointError(
                f"it is damaged: a storage that should have {storage.nbytes} bytes {found}; download it again"
            )
        return storage

    pickle = members[pickles[0]]
    file.seek(find_data(file, pickle))
    value = RestrictedUnpickler(file, pickle.size, TORCH_GLOBALS, load_storage).load()
    state = _find_state(value)
    return Contents(state, lambda storage: find_data(file, members[f"{folder}/data/{storage.key}"]))


# Torch's format before 1.6: five pickles, then the storages, each after its number of elements.


def _read_legacy(file: BinaryIO, size: int) -> Contents:
    storages: dict[str, Storage] = {}

    def load_storage(identity: tuple) -> Storage:
        storage = describe_storage(identity)
        if storage.nbytes > size:
            raise CheckpointError(_cut_short(size, storage.nbytes))
        if storages.setdefault(storage.key, storage).nbytes != storage.nbytes:
            raise CheckpointError("it is damaged: a storage is claimed in two sizes")
        return storage

    def load_pickle() -> Any:
        return RestrictedUnpickler(file, MAX_PICKLE_BYTES, TORCH_GLOBALS, load_storage).load()

    if load_pickle() != _LEGACY_MAGIC_NUMBER or load_pickle() != _LEGACY_PROTOCOL_VERSION:
        raise CheckpointError("it is a pickle, but not one that torch.save wrote")
    system = load_pickle()
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise CheckpointError("it was written on a big-endian machine; save it again on a usual one")
    state = _find_state(load_pickle())
    keys = load_pickle()
    if not isinstance(keys, list) or not all(isinstance(key, str) and key in storages for key in keys):
        raise CheckpointError("it is damaged: its list of storages does not match its tensors")
    positions = _locate_legacy_storages(file, [storages[key] for key in keys], size)
    if len(positions) != len(storages):
        raise CheckpointError("it is damaged: a storage is missing")
    return Contents(state, lambda storage: positions[storage.key])


def _locate_legacy_storages(file: BinaryIO, storages: list[Storage], size: int) -> dict[str, int]:
    """Where the data of ``storages``, which begin where ``file`` stands, lie."""
    positions = {}
    position = file.tell()
    for storage in storages:
        file.seek(position)
        count = int.from_bytes(file.read(8), "little")
        position += 8
        if position + storage.nbytes > size:
            raise CheckpointError(_cut_short(size, position + storage.nbytes))
        if count * storage.dtype.itemsize != storage.nbytes:
            raise CheckpointError("it is damaged: a storage has another size than its tensors claim")
        positions[storage.key] = position
        position += storage.nbytes
    return positions


def _find_state(value: Any) -> dict[str, Any]:
    """The state dict in what a torch file holds: the whole, or what stands under ``state_dict``."""
    if isinstance(value, Inert):
        raise CheckpointError(
            f"it holds a pickled {value.name!r} instead of a state dict, and getting that would run what"
            " the file says; have it saved as torch.save(model.state_dict(), file)"
        )
    if not isinstance(value, dict):
        kind = "tensor" if isinstance(value, StoredTensor) else type(value).__name__
        raise CheckpointError(f"it holds a {kind} instead of a state dict (tensors by name)")
    nested = value.get("state_dict")
    state = nested if isinstance(nested, dict) else value
    if state and not any(isinstance(entry, StoredTensor) for entry in state.values()):
        raise CheckpointError(
            "it holds no plain tensors, neither at its top level nor under 'state_dict'; its keys are"
            f" {quote_some(value)}"
        )
    return state


# Safetensors: the length of a JSON header, the header, the data.


def _read_safetensors(file: BinaryIO, size: int) -> Contents:
    length = int.from_bytes(file.read(8), "little")
    begin = 8 + length
    if begin > size:
        raise CheckpointError(_cut_short(size, begin))
    if length > MAX_SAFETENSORS_HEADER_BYTES:
        raise CheckpointError(f"its safetensors header claims {length} bytes, more than any checkpoint needs")
    text = file.read(length)
    if text.count(b"{") + text.count(b"[") > length // 8:  # three in 50 bytes or more, if it is a real one
        raise CheckpointError("its safetensors header holds brackets instead of tensors")
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError("its safetensors header is damaged; download it again") from error
    header.pop("__metadata__", None)
    state, starts, ranges = {}, {}, []
    for key, entry in header.items():
        state[key], first, last = _safetensors_entry(key, entry)
        starts[key] = begin + first
        ranges.append((first, last))
    _check_safetensors_ranges(ranges, begin, size)
    return Contents(state, lambda storage: starts[storage.key])


def _check_safetensors_ranges(ranges: list[tuple[int, int]], begin: int, size: int) -> None:
    """The data must fill the file without gaps or overlaps, as the format has it."""
    end = 0
    for first, last in sorted(ranges):
        if first != end:
            raise CheckpointError("its safetensors header is damaged: tensors' data overlap or leave gaps")
        end = last
    if begin + end > size:
        raise CheckpointError(_cut_short(size, begin + end))
    if begin + end < size:
        raise CheckpointError(f"it has {size} bytes, but its safetensors header accounts for {begin + end}")


def _safetensors_entry(key: str, entry: Any) -> tuple[StoredTensor, int, int]:
    """A tensor and where its data begins and ends."""
    damaged = CheckpointError(f"its safetensors header is damaged at {key[:80]!r}; download it again")
    if not isinstance(entry, dict):
        raise damaged
    dtype_name, shape, offsets = (entry.get(field) for field in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype_name, str) or not isinstance(shape, list) or not isinstance(offsets, list):
        raise damaged
    if len(offsets) != 2 or not all(type(value) is int and value >= 0 for value in [*shape, *offsets]):
        raise damaged
    dtype = DTYPES.get(SAFETENSORS_DTYPES.get(dtype_name, ""))
    if dtype is None:
        raise CheckpointError(f"its tensor {key[:80]!r} has the unknown dtype {dtype_name[:16]!r}")
    first, last = offsets
    stride: list[int] = []
    for length in reversed(shape[1:]):
        stride.insert(0, max(1, length) * (stride[0] if stride else 1))
    storage = Storage(key, dtype, last - first)
    tensor = describe_tensor(storage, dtype, 0, tuple(shape), tuple([*stride, 1][: len(shape)]))
    if tensor.nbytes != storage.nbytes:
        raise damaged
    return tensor, first, last


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return entries


# What else a file may be.

_FOREIGN_SIGNATURES = (
    (b"\x1f\x8b", "gzip-compressed; unpack it first"),
    (b"7z\xbc\xaf", "a 7-Zip archive; unpack it first"),
    (b"Rar!", "a RAR archive; unpack it first"),
    (b"\x89HDF", "an HDF5 file (Keras); use the model's PyTorch weights"),
    (b"GGUF", "a GGUF file; use the model's PyTorch weights"),
    (b"PK", "a damaged or empty zip archive; download it again"),
)


def _describe_foreign(head: bytes, size: int) -> str:
    """Why a file of ``size`` bytes that begins with ``head`` is no checkpoint, and what to do."""
    if size == 0:
        return "it is empty (0 bytes); download it again"
    if not head.strip(b"\0"):
        return f"it is filled with zeros ({size} bytes): the download never arrived; download it again"
    if head.startswith(b"version https://git-lfs"):
        expected = re.search(rb"^size (\d{1,20})$", head, re.MULTILINE)
        true_size = f" of {int(expected.group(1)):,} bytes" if expected else ""
        return (
            f"it is a git-lfs pointer ({size} bytes) to the weights{true_size}, not the weights:"
            " run `git lfs pull` in its folder, or download it again"
        )
    if re.match(rb"\s*<(!doctype|html|head|!--|\?xml)", head.lstrip(b"\xef\xbb\xbf"), re.IGNORECASE):
        return (
            "it is a web page (HTML) saved under this name, perhaps an error or a login page;"
            " download the file itself"
        )
    for signature, kind in _FOREIGN_SIGNATURES:
        if head.startswith(signature):
            return f"it is {kind}"
    if head[257:262] == b"ustar":
        return "it is a tar archive; unpack it first"
    try:
        beginning = head[:64].decode("ascii").split("\n")[0].strip()
    except UnicodeDecodeError:
        beginning = ""
    if beginning.isprintable() and beginning:
        return f"it is a text file, not a checkpoint; it begins with {beginning!r}"
    return (
        f"it is not a checkpoint that is known here (torch.save or safetensors): it has {size} bytes and"
        f" begins with {head[:8].hex(' ')}"
    )


def _cut_short(size: int, expected: int) -> str:
    return f"it is cut short: it has {size:,} bytes and should have at least {expected:,}; download it again"


def quote_some(names: Any) -> str:
    """The first few of ``names``, for a message."""
    shown = [repr(str(name)[:160]) for name, _ in zip(names, range(5))]
    rest = len(names) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "") if shown else "nothing"
