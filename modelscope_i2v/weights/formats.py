"""The two formats that weights come in: torch's zip archive (``torch.save`` since version 1.6), safetensors.

Each reader gives the file's state dict with descriptions in place of tensors, and a function that finds a
storage's bytes. The format is recognised by the content; a file that has neither gets an error that says what
it looks like. Both are little-endian, as is every machine this runs on.
"""

from __future__ import annotations

import json
import os
import re
import struct
import zipfile
from math import prod
from typing import Any, BinaryIO, Callable, Collection, NamedTuple

from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError
from .pickles import DTYPES, Inert, Storage, StoredTensor, describe_tensor, read_pickle

MAX_PICKLE_BYTES = 16 * 2**20  # 200 for each tensor

_SAFETENSORS_DTYPES = dict(
    F64="float64", F32="float32", F16="float16", BF16="bfloat16", I64="int64", I32="int32", I16="int16",
    I8="int8", U64="uint64", U32="uint32", U16="uint16", U8="uint8", BOOL="bool", C64="complex64",
    F8_E4M3="float8_e4m3fn", F8_E5M2="float8_e5m2",
)  # fmt: skip


class Contents(NamedTuple):
    """What a file holds: its values by key, and where in it a storage's bytes begin."""

    state: dict[str, Any]
    locate: Callable[[Storage], int]


def read_contents(file: BinaryIO) -> Contents:
    """Return the state dict in a file, whichever format it has.

    Raises:
        CheckpointError: the file is damaged or something else. A damaged one may raise anything whatever.
    """
    size = os.fstat(file.fileno()).st_size
    head = file.read(1024)
    # Safetensors first: the length that it begins with may look like the other signature.
    if head[5:9] == b"\0\0\0{":
        return _read_safetensors(file, size)
    if head.startswith(b"PK\x03\x04"):
        return _read_zip(file, size)
    raise CheckpointError(_describe_foreign(head, size))


def _open_archive(file: BinaryIO, size: int) -> tuple[dict[str, zipfile.ZipInfo], str, int]:
    """Return the members of torch's zip archive, the folder that they are in, and where they end."""
    try:
        archive = zipfile.ZipFile(file)
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"it is cut short or damaged ({error}; it has {size:,} bytes); download it again"
        ) from error
    members = {member.filename: member for member in archive.infolist()}
    pickles = [name for name in members if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(pickles) != 1:
        raise CheckpointError(
            f"it is a zip archive but no checkpoint: it holds {quote_some(members)};"
            " if the weights file is in it, unpack it first"
        )
    if any(m.compress_type or m.flag_bits & 1 or m.compress_size != m.file_size for m in members.values()):
        raise CheckpointError("its members are compressed or encrypted, which torch.save never does")
    if len(members) != len(archive.infolist()) or sum(m.file_size for m in members.values()) > size:
        raise CheckpointError("it is damaged: its members overlap, or one is there twice; download it again")
    return members, pickles[0].partition("/")[0], archive.start_dir


def _read_zip(file: BinaryIO, size: int) -> Contents:
    """Read a zip archive as torch.save writes it: it compresses nothing, so each member is a run of bytes."""
    members, folder, end = _open_archive(file, size)

    def begin(name: str) -> int:  # behind the member's own header, which has a length of its own
        member = members[f"{folder}/{name}"]
        file.seek(member.header_offset)
        signature, name_length, extra_length = struct.unpack("<4s22x2H", file.read(30))
        start = member.header_offset + 30 + name_length + extra_length
        if signature != b"PK\x03\x04" or start + member.file_size > end:
            raise CheckpointError(f"it is damaged: its member {member.filename!r} is not where it should be")
        return start

    def read(name: str) -> bytes:  # not by zipfile: torch can save without checksums
        length = members[f"{folder}/{name}"].file_size
        if length > MAX_PICKLE_BYTES:
            raise CheckpointError(f"its {name} has more than {MAX_PICKLE_BYTES:,} bytes")
        file.seek(begin(name))
        return file.read(length)

    def check_storage(storage: Storage) -> None:
        member = members.get(f"{folder}/data/{storage.key}")
        if member is None or member.file_size != storage.nbytes:
            found = f"has {member.file_size}" if member else "is not there"
            raise CheckpointError(
                f"it is damaged: a storage that should have {storage.nbytes} bytes {found}; download it again"
            )

    if f"{folder}/byteorder" in members and read("byteorder") != b"little":
        raise CheckpointError("it was written on a big-endian machine; save it again on a usual one")
    value = read_pickle(read("data.pkl"), check_storage)
    return Contents(_find_state(value), lambda storage: begin(f"data/{storage.key}"))


def _find_state(value: Any) -> dict[str, Any]:
    """Return the state dict in what a torch file holds: the whole, or what stands under ``state_dict``."""
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
        keys = [key if isinstance(key, str) else type(key).__name__ for key in value]
        raise CheckpointError(
            f"it holds no plain tensors, neither at its top level nor under 'state_dict'; its keys are"
            f" {quote_some(keys)}"
        )
    return {key: entry for key, entry in state.items() if isinstance(key, str)}


def _read_safetensors(file: BinaryIO, size: int) -> Contents:
    """Check a file with safetensors' own reader; only the places of the tensors are read here.

    Its tensors are not: that reader maps the file, whose pages would count as memory of this process a second
    time, and one that is cut short meanwhile, by a download, would end the process.
    """
    try:
        with safe_open(file.name, framework="numpy"):
            pass
    except SafetensorError as error:
        reason = str(error)[:200]
        raise CheckpointError(
            f"it is cut short or damaged ({reason}; it has {size:,} bytes); download it again"
        ) from error
    file.seek(0)
    begin = 8 + int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(begin - 8))
    header.pop("__metadata__", None)
    state = {}
    for key, entry in header.items():
        dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if _SAFETENSORS_DTYPES.get(dtype) not in DTYPES:
            raise CheckpointError(f"its tensor {key[:80]!r} has the unknown dtype {dtype}")
        storage = Storage(key, DTYPES[_SAFETENSORS_DTYPES[dtype]], last - first)
        stride = tuple(prod(shape[n + 1 :]) for n in range(len(shape)))
        state[key] = describe_tensor(storage, 0, tuple(shape), stride)
    return Contents(state, lambda storage: begin + header[storage.key]["data_offsets"][0])


def _describe_foreign(head: bytes, size: int) -> str:
    """Return why a file of so many bytes that begins with ``head`` is no checkpoint, and what to do."""
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
    if head.startswith(b"\x80"):
        return (
            "it is a pickle, as torch.save wrote it before version 1.6; if you trust it, save it again with a"
            " newer one: torch.save(torch.load(file, map_location='cpu'), file)"
        )
    return (
        f"it is not a checkpoint that is known here (torch.save or safetensors): it has {size} bytes and"
        f" begins with {head[:32]!r}"
    )


def quote_some(names: Collection[str]) -> str:
    """Return the first few of some names, for a message."""
    shown = [repr(name[:160]) for name, _ in zip(names, range(5))]
    rest = len(names) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "") if shown else "nothing"
