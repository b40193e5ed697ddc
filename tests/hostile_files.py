"""Weights files in torch's format written opcode by opcode, for the tests of hostile ones."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

import torch

from modelscope_i2v.weights import open_checkpoint

WEIGHT = struct.pack("<4f", 1.0, 2.0, 3.0, 4.0)


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    data = value.to_bytes(16, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def sizes(values: tuple) -> bytes:
    return b"(" + b"".join(number(value) for value in values) + b"t"


def tensor(shape=(4,), stride=(1,), offset=0, key="0", numel=4) -> bytes:
    """The opcodes of a float32 tensor; by default of one that lies in a storage of WEIGHT."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + number(numel)
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"tQ"
        + number(offset) + sizes(shape) + sizes(stride) + b"\x89ccollections\nOrderedDict\n)RtR"
    )  # fmt: skip


def state_dict(**entries: bytes) -> bytes:
    return b"\x80\x02}(" + b"".join(text(key) + value for key, value in entries.items()) + b"u."


def write(path: Path, method: int = zipfile.ZIP_STORED, order: bytes = b"little", **entries: bytes) -> Path:
    """A checkpoint of the tensor ``weight``, which is WEIGHT, and of further entries or another one."""
    members = {"data.pkl": state_dict(**{"weight": tensor(), **entries}), "version": b"3\n"}
    members.update({"byteorder": order, "data/0": WEIGHT})
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(f"archive/{name}", data)
    return path


def read_everything(path: Path) -> dict[str, torch.Tensor]:
    with open_checkpoint(path) as checkpoint:
        return {key: checkpoint.read(key) for key in checkpoint}
