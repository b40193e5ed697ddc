"""Weights files that lie: they take no memory beyond reason and cause nothing but CheckpointError."""

from __future__ import annotations

import random
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy
import pytest
import safetensors.torch
import torch
from hostile_files import WEIGHT, WRITERS, number, read_everything, state_dict, tensor, text, write, zip_file

from modelscope_i2v.errors import CheckpointError
from modelscope_i2v.weights import open_checkpoint

each_container = pytest.mark.parametrize("container", WRITERS)


# Tensors that lie


@each_container
@pytest.mark.parametrize(
    "lie",
    [
        dict(shape=(5,)),
        dict(shape=(2**62,)),
        dict(shape=(2**100,)),
        dict(shape=(2**40, 2**40), stride=(0, 1)),
        dict(shape=(-1,)),
        dict(shape=(2,), stride=(4,)),
        dict(shape=(2,), stride=(-1,), offset=3),
        dict(shape=(2,), stride=(2**62,)),
        dict(shape=(2, 2), stride=(1,)),
        dict(shape=(1,) * 65, stride=(1,) * 65),
        dict(offset=1),
        dict(offset=-1),
        dict(offset=2**62),
        dict(key="7"),
        dict(key="../0"),
        dict(key=""),
        dict(numel=3),
        dict(numel=5),
        dict(numel=-4),
        dict(numel=2**62),
        dict(numel=2**80),
    ],
    ids=str,
)
def test_a_tensor_beyond_its_storage_or_a_storage_beyond_the_file_is_refused(tmp_path, container, lie):
    program = state_dict(weight=tensor(legacy=container == "legacy", **lie))
    path = WRITERS[container](tmp_path / "weights", program, {"0": WEIGHT})
    with pytest.raises(CheckpointError, match="weights' cannot be used: it"):
        open_checkpoint(path)


@each_container
def test_a_tensor_repeated_beyond_the_files_size_is_refused_before_it_is_made(tmp_path, container):
    large = tensor(shape=(2**20, 2**20), stride=(0, 0), legacy=container == "legacy")
    path = WRITERS[container](tmp_path / "weights", state_dict(weight=large), {"0": WEIGHT})
    with open_checkpoint(path) as checkpoint, pytest.raises(CheckpointError, match="more than the file's"):
        checkpoint.read("weight")


@each_container
def test_a_storage_claimed_in_two_sizes_is_refused(tmp_path, container):
    smaller = tensor(shape=(2,), numel=2, legacy=container == "legacy")
    with pytest.raises(CheckpointError, match="two sizes|should have 8 bytes has 16"):
        open_checkpoint(write(container, tmp_path / "weights", {"other": smaller}))


def test_a_legacy_storage_that_is_missing_or_of_another_size_is_refused(tmp_path):
    program = state_dict(weight=tensor(legacy=True))
    with pytest.raises(CheckpointError, match="a storage is missing"):
        open_checkpoint(WRITERS["legacy"](tmp_path / "weights", program, {}))
    path = WRITERS["legacy"](tmp_path / "weights", program, {"0": WEIGHT})
    path.write_bytes(path.read_bytes().replace(struct.pack("<q", 4) + WEIGHT, struct.pack("<q", 3) + WEIGHT))
    with pytest.raises(CheckpointError, match="another size than its tensors claim"):
        open_checkpoint(path)


@pytest.mark.parametrize("order", [b"big", b"", b"little\n"])
def test_another_byte_order_is_refused(tmp_path, order):
    path = zip_file(tmp_path / "weights", state_dict(weight=tensor()), {"0": WEIGHT}, byteorder=order)
    with pytest.raises(CheckpointError, match="big-endian"):
        open_checkpoint(path)


def test_a_legacy_file_of_another_byte_order_is_refused(tmp_path):
    path = write("legacy", tmp_path / "weights", {})
    path.write_bytes(path.read_bytes().replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89"))
    with pytest.raises(CheckpointError, match="big-endian"):
        open_checkpoint(path)


# Zip archives that lie


def patched(path: Path, signature: bytes, offset: int, replacement: bytes, occurrence: int = 0) -> None:
    """Overwrites what stands ``offset`` bytes behind an occurrence of a header's signature."""
    data = bytearray(path.read_bytes())
    position = -1
    for _ in range(occurrence + 1):
        position = data.index(signature, position + 1)
    data[position + offset : position + offset + len(replacement)] = replacement
    path.write_bytes(bytes(data))


ENTRY, LOCAL, END = b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06"


@pytest.mark.parametrize(
    "patch",
    [
        (ENTRY, 8, b"\x01"),
        (ENTRY, 10, b"\x08"),
        (ENTRY, 20, b"\xff\xff"),
        (ENTRY, 24, b"\xff\xff\xff\x7f"),
        (ENTRY, 20, b"\xff\xff\xff\x7f\xff\xff\xff\x7f"),
        (ENTRY, 20, b"\xff" * 8),
        (ENTRY, 28, b"\xff\xff"),
        (ENTRY, 42, b"\xff\xff\xff\x00"),
        (ENTRY, 42, b"\x00\x00\x00\x00", 1),
        (ENTRY, 46, b"X"),
        (LOCAL, 8, b"\x08"),
        (LOCAL, 18, b"\x07"),
        (LOCAL, 26, b"\x05"),
        (LOCAL, 28, b"\xff\x00"),
        (LOCAL, 28, b"\x08\x00", 2),
        (LOCAL, 30, b"X"),
        (LOCAL, 0, b"XK\x03\x04"),
        (END, 4, b"\x01"),
        (END, 10, b"\xff\xff"),
        (END, 10, b"\x01\x00"),
        (END, 12, b"\xff\xff\xff\xff"),
        (END, 16, b"\xff\xff\xff\x00"),
        (END, 20, b"\x05"),
    ],
    ids=str,
)
def test_a_zip_archive_that_contradicts_itself_is_refused(tmp_path, patch):
    path = write("zip", tmp_path / "weights", {})
    patched(path, *patch)
    with pytest.raises(CheckpointError):
        read_everything(path)


def test_compressed_members_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "weights", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", state_dict(weight=tensor(shape=(2**22,), numel=2**22)))
        archive.writestr("archive/data/0", bytes(2**24))
    with pytest.raises(CheckpointError, match="compressed or encrypted"):
        open_checkpoint(tmp_path / "weights")


def test_overlapping_members_are_refused(tmp_path):
    path = write("zip", tmp_path / "weights", {})
    patched(path, ENTRY, 42, b"\x00\x00\x00\x00", 2)  # the third begins where the first does
    with pytest.raises(CheckpointError, match="overlaps the next"):
        open_checkpoint(path)


def test_members_of_one_name_are_refused(tmp_path):
    path = write("zip", tmp_path / "weights", {})
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data/0", bytes(16))
    with pytest.raises(CheckpointError, match="one member twice"):
        open_checkpoint(path)


def rewritten_end(path: Path, entry: bytes = b"", before_end: bytes = b"") -> None:
    """Replaces the directory's last entry, and puts something before the end record."""
    data = path.read_bytes()
    start, last, end = data.index(ENTRY), data.rindex(ENTRY), data.rindex(END)
    directory = data[start:last] + (entry or data[last:end])
    end_record = data[end : end + 12] + struct.pack("<LLH", len(directory), start, 0)
    path.write_bytes(data[:start] + directory + before_end + end_record)


def test_sizes_and_places_of_64_bits_are_read(tmp_path):
    path = write("zip", tmp_path / "weights", {})
    data = path.read_bytes()
    last, end, header = data.rindex(ENTRY), data.rindex(END), data.rindex(LOCAL)
    extra = struct.pack(
        "<2H2B2H3Q", 0x9999, 2, 0, 0, 1, 24, 16, 16, header
    )  # a foreign field, then that of zip64
    fixed = data[last : last + 20] + b"\xff" * 8 + data[last + 28 : last + 30] + struct.pack("<H", len(extra))
    fixed += data[last + 32 : last + 42] + b"\xff" * 4
    rewritten_end(path, fixed + data[last + 46 : end] + extra)
    assert zipfile.ZipFile(path).read("archive/data/0") == WEIGHT
    assert read_everything(path)["weight"].tolist() == [1, 2, 3, 4]
    rewritten_end(path, fixed + data[last + 46 : end] + extra[:6] + bytes(len(extra) - 6))
    with pytest.raises(CheckpointError, match="lacks a size"):
        open_checkpoint(path)


@pytest.mark.parametrize("place", [0, 2**40, 2**64 - 1])
def test_a_directory_of_64_bits_that_is_not_there_is_refused(tmp_path, place):
    path = write("zip", tmp_path / "weights", {})
    rewritten_end(path, before_end=struct.pack("<4sLQL", b"PK\x06\x07", 0, place, 1))
    with pytest.raises(CheckpointError, match=f"'{path}' cannot be used: it is"):
        open_checkpoint(path)


# Safetensors that lie


@pytest.mark.parametrize(
    "header",
    [
        '{"a":{"dtype":"F32","shape":[5],"data_offsets":[0,16]}}',
        '{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,16]}}',
        '{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,20]}}',
        '{"a":{"dtype":"F32","shape":[4],"data_offsets":[4,20]}}',
        '{"a":{"dtype":"F32","shape":[4],"data_offsets":[16,0]}}',
        '{"a":{"dtype":"F32","shape":[-4],"data_offsets":[0,16]}}',
        '{"a":{"dtype":"F32","shape":[4.0],"data_offsets":[0,16]}}',
        '{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,16]}}',
        '{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,16]}}',
        '{"a":{"dtype":"F32","shape":[' + "9" * 100_000 + '],"data_offsets":[0,16]}}',
        '{"a":{"dtype":"F9","shape":[4],"data_offsets":[0,16]}}',
        '{"a":{"dtype":["F32"],"shape":[4],"data_offsets":[0,16]}}',
        '{"a":{"shape":[4],"data_offsets":[0,16]}}',
        '{"a":{"dtype":"F32","shape":[4],"data_offsets":[0]}}',
        '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
        '{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
        '{"a":5}',
        '{"a":',
        '{"a":' + "[" * 100_000,
        '{"a":"' + "x" * 800_000 + '","b":' + "[" * 100_000,
        '{"\\ud800"}',
    ],
    ids=lambda header: header[:60],
)
def test_a_safetensors_header_that_lies_is_refused(tmp_path, header):
    (tmp_path / "weights").write_bytes(struct.pack("<Q", len(header)) + header.encode() + WEIGHT)
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / "weights")


# Memory

N = 20_000
LONG_NAME = text("n" * 200)
BOMBS = {
    "memo index": b"Nr\xff\xff\xff\xff0",
    "memo index in words": b"Np99999999999999999999999999999\n0",
    "frame": b"\x95\xff\xff\xff\xff\xff\xff\xff\x7fN",
    "long text": b"\x8d\x00\x00\x00\x00\x40\x00\x00\x00",
    "long bytes": b"\x8e\xff\xff\xff\xff\xff\xff\xff\xff",
    "long bytearray": b"\x96\x00\x00\x00\x00\x40\x00\x00\x00",
    "text of 2 GB": b"X\xff\xff\xff\x7f",
    "long number": b"\x8b\xff\xff\xff\x7f",
    "negative length": b"\x8b\xff\xff\xff\xff",
    "digits": b"I" + b"9" * (10 * N) + b"\n",
    "digits of a long": b"L" + b"9" * (10 * N) + b"L\n",
    "endless line": b"V" + b"x" * (10 * N),
    "wide text": b"X" + struct.pack("<I", 4 * N + 4) + b"a" * (4 * N) + "\U0001f600".encode(),
    "nested lists": b"]" * N + b"a" * (N - 1),
    "nested tuples": b")" + b"\x85" * N,
    "nested tuples as a key": b"}" + b")" + b"\x85" * N + b"Ns",
    "nested tuples in a set": b"\x8f()" + b"\x85" * N + b"\x90",
    "nested dicts": b"}" + (text("k") + b"}") * N + b"s" * N,
    "a list in itself": b"]q\x000h\x00h\x00a",
    "laughing lists": b"]q\x000"
    + b"".join(b"](" + b"h%c" % i * 100 + b"eq%c0" % (i + 1) for i in range(100)) + b"hd",
    "dicts": b"(" + b"}" * (5 * N) + b"t",
    "lists": b"(" + b"]" * (5 * N) + b"t",
    "sets": b"(" + b"\x8f" * (5 * N) + b"t",
    "marks": b"(" * (5 * N),
    "memo": b"N" + b"\x94" * (5 * N),
    "duplicates": b"N" + b"2" * (5 * N) + b"0" * (5 * N),
    "ordered dicts": b"ccollections\nOrderedDict\nq\x000" + b"(" + b"h\x00)R" * N + b"t",
    "names": LONG_NAME + b"q\x000(" + b"h\x00h\x00\x93" * N + b"t",
    "long names": text("n" * N) + b"q\x000(" + b"h\x00h\x00\x93" * N + b"t",
    "growing lists": b"](" + b"N" * N + b"eq\x000" + b"](h\x00h\x00e0" * N + b"N",
    "numbers": b"(" + b"M\xff\xff" * (2 * N) + b"l",
    "tensors": tensor() + b"q\x00",
    "described tensors": b"ctorch._utils\n_rebuild_tensor\nq\x000((" + text("storage")
    + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + number(4) + b"tQK\x00))tq\x010("
    + b"h\x00h\x01R" * N + b"t",
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_memory_stays_in_proportion_to_the_file(tmp_path, monkeypatch, bomb):
    # For small bombs.
    monkeypatch.setattr("modelscope_i2v.weights.restricted_unpickler.ALLOWANCE_BYTES", 2**18)
    path = write("zip", tmp_path / "weights", {"bomb": BOMBS[bomb]})
    tracemalloc.start()
    try:
        read_everything(path)
    except CheckpointError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2**20 + 72 * path.stat().st_size


@pytest.mark.parametrize(
    "bomb, reason",
    [
        ("long names", "a name longer than any real one"),
        ("long number", "a number of 2147483647 bytes"),
        ("digits", "a line that has no end"),
        ("dicts", "far more memory than it has bytes"),
        ("text of 2 GB", "cut short, or is longer"),
        ("memo index in words", "a line that has no end"),
    ],
)
def test_a_bomb_is_refused_for_what_it_is(tmp_path, monkeypatch, bomb, reason):
    monkeypatch.setattr("modelscope_i2v.weights.restricted_unpickler.ALLOWANCE_BYTES", 2**18)
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(write("zip", tmp_path / "weights", {"bomb": BOMBS[bomb]}))


def test_a_key_nested_too_deeply_to_be_hashed_is_not_hashed(tmp_path):
    program = b"}" + b")" + b"\x85" * 150_000 + b"Ns"  # the standard dict's hash would overflow the C stack
    path = write("zip", tmp_path / "weights", {"nested": program})
    assert list(read_everything(path)) == ["weight"]


@pytest.mark.parametrize(
    "count, text_of", [(50_000, "[],"), (50_000, "{},"), (50_000, '"ab",'), (50_000, "1.5,")], ids=str
)
def test_memory_of_a_safetensors_header_stays_in_proportion(tmp_path, count, text_of):
    header = ('{"__metadata__":[' + text_of * count + "0]}").encode()
    (tmp_path / "weights").write_bytes(struct.pack("<Q", len(header)) + header)
    tracemalloc.start()
    try:
        read_everything(tmp_path / "weights")
    except CheckpointError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2**20 + 13 * len(header)


def test_a_directory_of_too_many_members_is_refused_by_their_count(tmp_path, monkeypatch):
    path = write("zip", tmp_path / "weights", {})
    monkeypatch.setattr("modelscope_i2v.weights.zip_members.MAX_MEMBERS", 2)
    with pytest.raises(CheckpointError, match="claims 3 members"):
        open_checkpoint(path)


def test_a_directory_of_fewer_members_than_it_claims_is_refused(tmp_path):
    path = write("zip", tmp_path / "weights", {})
    data = path.read_bytes()
    end = data.index(END)
    directory = bytes(46 * 0xFFFE)
    fields = struct.pack("<4s4H2LH", END, 0, 0, 0xFFFE, 0xFFFE, len(directory), end, 0)
    path.write_bytes(data[:end] + directory + fields)
    with pytest.raises(CheckpointError):
        open_checkpoint(path)


# Any bytes whatever


def sample(name: str, folder: Path) -> bytes:
    state = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor(1), "c": torch.ones(3).half()}
    path = folder / "sample"
    if name == "safetensors":
        safetensors.torch.save_file(state, path)
    else:
        extra = {"epoch": 1, "callbacks": {"x": [1.5, None, (b"y", numpy.float32(2))]}}
        torch.save({"state_dict": state, **extra}, path, _use_new_zipfile_serialization=name == "zip")
    return path.read_bytes()


def mutated(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        position = draw.randrange(len(changed) or 1)
        count = draw.choice((1, 1, 2, 4, 8, 100))
        kind = draw.randrange(6)
        if kind == 0:
            changed[position : position + count] = draw.randbytes(count)
        elif kind == 1:
            changed[position : position + count] = b""
        elif kind == 2:
            changed[position:position] = changed[position // 2 : position // 2 + count]
        elif kind == 3:
            changed[position : position + count] = draw.choice((b"\x00", b"\xff", b"\x7f")) * count
        elif kind == 4:
            changed[position : position + 1] = bytes(
                [draw.choice(b"()tRcbQo.}]eu\x81\x92\x93\x85iq\x94h0129")]
            )
        else:
            del changed[position:]
    return bytes(changed)


@pytest.mark.parametrize("name", ["zip", "legacy", "safetensors"])
def test_damaged_files_are_read_or_refused_and_nothing_else(tmp_path, name):
    data = sample(name, tmp_path)
    draw = random.Random(name)
    pickle_end = data.index(b"PK\x03\x04", 1) if name == "zip" else len(data)
    refused = 0
    for trial in range(300):
        if name == "zip" and trial % 2:  # half of the damage to the pickle alone, which is a small part
            damaged = (
                mutated(data[:pickle_end], draw)[:pickle_end].ljust(pickle_end, b"\0") + data[pickle_end:]
            )
        else:
            damaged = mutated(data, draw)
        (tmp_path / "damaged").write_bytes(damaged)
        try:
            read_everything(tmp_path / "damaged")
        except CheckpointError as error:
            assert str(tmp_path / "damaged") in str(error)
            refused += 1
    assert 30 < refused < 300
