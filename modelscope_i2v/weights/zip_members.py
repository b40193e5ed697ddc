"""Where the members of an uncompressed zip archive lie in its file.

``torch.save`` writes a zip archive that compresses nothing, so that each member is a plain run of bytes.
The standard ``zipfile`` does not say where those runs are, and takes what a directory claims on trust;
here every claim is checked: no member is compressed or encrypted, overlaps another or leaves the file.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import BinaryIO

from modelscope_i2v.errors import CheckpointError

MAX_MEMBERS = 2**18

_END = struct.Struct("<4s4H2LH")
_END_SIGNATURE = b"PK\x05\x06"
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64_LOCATOR_SIGNATURE = b"PK\x06\x07"
_END64 = struct.Struct("<4sQ2H2L4Q")
_END64_SIGNATURE = b"PK\x06\x06"
_ENTRY = struct.Struct("<4s6H3L5H2L")
_ENTRY_SIGNATURE = b"PK\x01\x02"
_LOCAL = struct.Struct("<4s5H3L2H")
_LOCAL_SIGNATURE = b"PK\x03\x04"

_ZIP64_FIELD = 0x0001
_ENCRYPTED = 0x0001
_UNKNOWN = 0xFFFFFFFF  # in a 32-bit field: see the zip64 field, or the directory
_MAX_COMMENT = 0xFFFF


@dataclass
class ZipMember:
    """A member as the directory has it.

    ``size`` is what it takes in the file, ``plain`` whether it is neither compressed nor encrypted,
    ``header`` where its local header begins, behind which its data stand, and ``limit`` where what follows it
    in the file begins.
    """

    name: bytes
    size: int
    plain: bool
    header: int
    limit: int


def read_members(file: BinaryIO) -> dict[str, ZipMember]:
    """The members of the archive in ``file`` by name, from its directory alone."""
    start, size, count = _find_directory(file)
    if count > MAX_MEMBERS or count * _ENTRY.size > size:
        raise CheckpointError(f"its zip directory claims {count} members in {size} bytes")
    directory = _read_at(file, start, size)
    entries = []
    position = 0
    for _ in range(count):
        member, position = _read_entry(directory, position, start)
        entries.append(member)
    entries.sort(key=lambda member: member.header)
    for member, following in zip(entries, entries[1:]):
        member.limit = following.header
    for member in entries:
        if member.header + _LOCAL.size + len(member.name) + member.size > member.limit:
            raise CheckpointError(
                f"its zip member {_text(member.name)!r} overlaps the next or leaves the file"
            )
    members = {_text(member.name): member for member in entries}
    if len(members) != count:
        raise CheckpointError("its zip directory names one member twice")
    return members


def find_data(file: BinaryIO, member: ZipMember) -> int:
    """Where the bytes of ``member`` begin, by its local header, which must agree with the directory."""
    fields = _LOCAL.unpack(_read_at(file, member.header, _LOCAL.size))
    signature, _, _, method, _, _, _, stored, size, name_length, extra_length = fields
    start = member.header + _LOCAL.size + name_length + extra_length
    agrees = (
        signature == _LOCAL_SIGNATURE
        and method == 0
        and _read_at(file, member.header + _LOCAL.size, name_length) == member.name
        # Either is 0 or unknown where the size was not known yet, or is too large for the field.
        and {stored, size} <= {0, _UNKNOWN, member.size}
        and start + member.size <= member.limit
    )
    if not agrees:
        raise CheckpointError(f"it is damaged: its member {_text(member.name)!r} is not where it should be")
    return start


def _find_directory(file: BinaryIO) -> tuple[int, int, int]:
    """The directory's position, its size, and its number of entries."""
    file_size = file.seek(0, os.SEEK_END)
    tail_start = max(0, file_size - _END.size - _MAX_COMMENT)
    tail = _read_at(file, tail_start, file_size - tail_start)
    end = tail.rfind(_END_SIGNATURE)
    if end < 0 or end + _END.size > len(tail):
        raise CheckpointError(
            f"it is cut short: the end of the archive is missing after {file_size} bytes; download it again"
        )
    _, disk, _, _, count, size, start, comment = _END.unpack_from(tail, end)
    if disk not in (0, 0xFFFF) or end + _END.size + comment != len(tail):
        raise CheckpointError("it is damaged: the archive does not end where it says; download it again")
    end += tail_start
    locator_start = end - _END64_LOCATOR.size
    if locator_start >= 0:
        locator = _END64_LOCATOR.unpack(_read_at(file, locator_start, _END64_LOCATOR.size))
        if locator[0] == _END64_LOCATOR_SIGNATURE:
            end = locator[2]
            signature, _, _, _, _, _, _, count, size, start = _END64.unpack(_read_at(file, end, _END64.size))
            if signature != _END64_SIGNATURE or end + _END64.size > locator_start:
                raise CheckpointError("it is damaged: its zip directory is not where it says")
    if start + size > end:
        raise CheckpointError("it is damaged: its zip directory is not where it says")
    return start, size, count


def _read_entry(directory: bytes, position: int, limit: int) -> tuple[ZipMember, int]:
    """The member that the entry at ``position`` is about, and where the next entry begins."""
    if position + _ENTRY.size > len(directory):
        raise CheckpointError("it is damaged: its zip directory is cut short")
    fields = _ENTRY.unpack_from(directory, position)
    signature, _, _, flags, method, _, _, _, stored, size = fields[:10]
    name_length, extra_length, comment_length, _, _, _, header = fields[10:]
    position += _ENTRY.size
    name = directory[position : position + name_length]
    position += name_length
    extra = directory[position : position + extra_length]
    position += extra_length + comment_length
    if signature != _ENTRY_SIGNATURE or position > len(directory):
        raise CheckpointError("it is damaged: its zip directory is cut short or overwritten")
    size, stored, header = _widen(extra, size, stored, header)
    plain = method == 0 and not flags & _ENCRYPTED
    if plain and stored != size:
        raise CheckpointError(f"its zip member {_text(name)!r} claims two sizes, {stored} and {size}")
    return ZipMember(name, stored, plain, header, limit), position


def _widen(extra: bytes, *values: int) -> list[int]:
    """``values`` of 32 bits with the unknown ones among them taken from the zip64 field of ``extra``."""
    if _UNKNOWN not in values:
        return list(values)
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        position += 4
        if kind == _ZIP64_FIELD:
            wanted = values.count(_UNKNOWN)
            if length < 8 * wanted or position + length > len(extra):
                break
            wide = iter(struct.unpack_from(f"<{wanted}Q", extra, position))
            return [next(wide) if value == _UNKNOWN else value for value in values]
        position += length
    raise CheckpointError("it is damaged: its zip directory lacks a size")


def _read_at(file: BinaryIO, position: int, count: int) -> bytes:
    file.seek(position)
    data = file.read(count)
    if len(data) != count:
        raise CheckpointError("it is cut short or damaged; download it again")
    return data


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
