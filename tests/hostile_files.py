"""Weights files written opcode by opcode, in both of torch's containers, for the tests of hostile ones."""

from __future__ import annotations

import pickle
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


def tensor(
    shape: tuple = (4,),
    stride: tuple = (1,),
    offset: int = 0,
    key: str = "0",
    numel: int = 4,
    legacy: bool = False,
) -> bytes:
    """The opcodes of a float32 tensor; by default of one that lies in a storage of WEIGHT."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + number(numel)
    storage += (b"N" if legacy else b"") + b"tQ"
    hooks = b"ccollections\nOrderedDict\n)R"
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage + number(offset) + sizes(shape) + sizes(stride) + b"\x89" + hooks + b"tR"
    )  # fmt: skip


def state_dict(**entries: bytes) -> bytes:
    return b"\x80\x02}(" + b"".join(text(key) + value for key, value in entries.items()) + b"u."


def zip_file(path: Path, program: bytes, storages: dict[str, bytes], **others: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/version", b"3\n")
        for name, data in {**{f"data/{key}": data for key, data in storages.items()}, **others}.items():
            archive.writestr(f"archive/{name}", data)
    return path


def legacy_file(path: Path, program: bytes, storages: dict[str, bytes]) -> Path:
    head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}]
    with open(path, "wb") as file:
        for value in head:
            pickle.dump(value, file, protocol=2)
        file.write(program)
        pickle.dump(sorted(storages), file, protocol=2)
        for key in sorted(storages):
            file.write(struct.pack("<q", len(storages[key]) // 4) + storages[key])
    return path


WRITERS = {"zip": zip_file, "legacy": legacy_file}


def write(container: str, path: Path, entries: dict[str, bytes]) -> Path:
    weight = tensor(legacy=container == "legacy")
    return WRITERS[container](path, state_dict(weight=weight, **entries), {"0": WEIGHT})


def read_everything(path: Path) -> dict[str, torch.Tensor]:
    with open_checkpoint(path) as checkpoint:
        return {key: checkpoint.read(key) for key in checkpoint}
