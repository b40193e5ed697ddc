"""Hostile weights files: nothing in them runs, they take memory and time within reason, lies are refused.

That each attack is one is checked too: the standard unpickler falls for it.
"""

from __future__ import annotations

import copyreg
import os
import pickle
import random
import struct
import time
import tracemalloc
import zipfile
from io import BytesIO

import numpy
import pytest
import safetensors.torch
import torch
from hostile_files import WEIGHT, read_everything, state_dict, tensor, text, write
from torch import nn

from modelscope_i2v.errors import CheckpointError
from modelscope_i2v.weights import find_checkpoint, load_weights, open_checkpoint, pickles

# Code in a file


class Touch:
    """Its pickle calls open(path, "w"), which makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


class TouchOnState:
    """Its pickle has a state, which makes a file when it is set."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __setstate__(self, state: dict) -> None:
        open(state["path"], "w").close()


class TouchOnItems(dict):
    """Its pickle has items, which make files when they are set."""

    def __setitem__(self, key: str, value: str) -> None:
        open(value, "w").close()


def opcodes(value: object, protocol: int = 2) -> bytes:
    """The pickle of ``value`` without its first and last opcode (and, since protocol 4, its frame)."""
    data = pickle.dumps(value, protocol)
    return data[11:-1] if data[2:3] == b"\x95" else data[2:-1]


def saved_by_torch(value: object) -> bytes:
    buffer = BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def items(path: str) -> bytes:
    value = TouchOnItems()
    dict.__setitem__(value, "key", path)
    return opcodes(value)


def object_array(path: str) -> bytes:
    array = numpy.empty(1, dtype=object)
    array[0] = Touch(path)
    return opcodes(array)


def command(path: str) -> bytes:
    return text(f"touch '{path}'")


def source(path: str) -> bytes:
    return text(f"open({path!r}, 'w').close()")


ATTACKS = {
    "os.system": lambda p: b"cos\nsystem\n" + command(p) + b"\x85R",
    "eval": lambda p: b"cbuiltins\neval\n" + source(p) + b"\x85R",
    "exec by stack global": lambda p: text("builtins") + text("exec") + b"\x93" + source(p) + b"\x85R",
    "dotted name": lambda p: b"\x80\x04" + text("torch.serialization") + text("os.system") + b"\x93"
    + command(p) + b"\x85R",
    "inst": lambda p: b"(" + command(p) + b"ios\nsystem\n",
    "obj": lambda p: b"(csubprocess\ncall\n" + text("touch") + b"0](" + text("touch") + text(p) + b"eo",
    "extension": lambda p: b"\x82\xf0" + command(p) + b"\x85R",
    "newobj": lambda p: b"cbuiltins\nbytes\ncbuiltins\nmap\ncbuiltins\neval\n](" + source(p)
    + b"e\x86\x81\x85\x81",
    "getattr chain": lambda p: b"cbuiltins\ngetattr\ncbuiltins\n__import__\n" + text("os") + b"\x85R"
    + text("system") + b"\x86R" + command(p) + b"\x85R",
    "reduce": lambda p: opcodes(Touch(p)),
    "setstate": lambda p: opcodes(TouchOnState(p)),
    "setitem": items,
    "pickle in a pickle": lambda p: b"cpickle\nloads\n" + opcodes(pickle.dumps(Touch(p)), 3) + b"\x85R",
    "torch.load in a pickle": lambda p: b"ctorch.storage\n_load_from_bytes\n"
    + opcodes(saved_by_torch({"w": Touch(p)}), 3) + b"\x85R",
    "numpy array of objects": object_array,
    "as a dict's key": lambda p: b"}" + b"cos\nsystem\n" + command(p) + b"\x85RNs",
    "as a hook": lambda p: b"ctorch._utils\n_rebuild_parameter\nN\x89" + opcodes(Touch(p)) + b"\x87R",
}  # fmt: skip


@pytest.fixture
def registered_extension(monkeypatch):
    """os.system among copyreg's extensions, and already looked up once."""
    monkeypatch.setitem(copyreg._inverted_registry, 0xF0, ("os", "system"))
    monkeypatch.setitem(copyreg._extension_cache, 0xF0, os.system)


@pytest.mark.usefixtures("registered_extension")
@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_in_a_file_runs(tmp_path, attack):
    canary = tmp_path / "canary"
    program = ATTACKS[attack](str(canary))
    plain = write(tmp_path / "plain")  # else as the one with the attack in it
    assert read_everything(plain)["weight"].tolist() == [1, 2, 3, 4]
    assert torch.load(plain, weights_only=True)["weight"].tolist() == [1, 2, 3, 4]
    try:
        pickle.loads(b"\x80\x02" + program + b".")
    except Exception:
        assert attack in ("as a hook", "newobj")  # which fail, but only after the damage
    assert canary.exists(), "this attack is none"
    canary.unlink()

    path = write(tmp_path / "weights", evil=program)
    module = nn.Module()
    module.weight, module.evil = (nn.Parameter(torch.empty(4, device="meta")) for _ in range(2))
    # Either the opcodes are refused, or what the program makes is no tensor.
    with pytest.raises(
        CheckpointError, match="no checkpoint needs|1 keys that hold no plain tensor .'evil: "
    ):
        load_weights(module, path)
    with zipfile.ZipFile(tmp_path / "whole", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + program + b".")
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / "whole")
    assert not canary.exists()


def test_what_a_file_can_reach_cannot_be_changed_by_it(tmp_path):
    """A state with slots sets attributes; the next file must not meet them."""
    slots = b"N}" + text("call") + b"Ns" + text("dtype") + b"Ns" + text("shape") + b"Ns\x86b"
    reachable = {
        "function": b"ctorch._utils\n_rebuild_tensor_v2\n", "class": b"ccollections\nOrderedDict\n",
        "storage type": b"ctorch\nFloatStorage\n", "dtype": b"ctorch\nfloat32\n", "tensor": tensor(),
        "foreign class": b"cos\nsystem\n", "dict": b"ccollections\nOrderedDict\n)R",
    }  # fmt: skip
    for number_, (name, program) in enumerate(reachable.items()):
        path = write(tmp_path / str(number_), evil=program + slots)
        try:
            open_checkpoint(path)
        except CheckpointError:
            assert name not in ("foreign class", "dict")
        assert read_everything(write(tmp_path / "good"))["weight"].tolist() == [1, 2, 3, 4]
    assert not hasattr(pickles.Inert, "call") and not hasattr(pickles._OrderedDict, "call")


# Lies about sizes


@pytest.mark.parametrize(
    "lie",
    [
        dict(shape=(5,)), dict(shape=(2**62,)), dict(shape=(2**100,)), dict(shape=(-1,)),
        dict(shape=(2**40, 2**40), stride=(0, 1)), dict(shape=(2**62, 2**62, 0), stride=(1,)),
        dict(shape=(2,), stride=(4,)), dict(shape=(2,), stride=(-1,), offset=3),
        dict(shape=(2,), stride=(2**62,)), dict(shape=(2, 2), stride=(1,)),
        dict(shape=(1,) * 65, stride=(1,) * 65),
        dict(offset=1), dict(offset=-1), dict(offset=2**62),
        dict(key="7"), dict(key="../0"), dict(key=""),
        dict(numel=3), dict(numel=5), dict(numel=-4), dict(numel=2**62), dict(numel=2**80),
    ],
    ids=str,
)  # fmt: skip
def test_a_tensor_beyond_its_storage_or_a_storage_beyond_the_file_is_refused(tmp_path, lie):
    with pytest.raises(CheckpointError, match="weights' cannot be used: it "):
        open_checkpoint(write(tmp_path / "weights", weight=tensor(**lie)))


def test_a_tensor_repeated_beyond_the_files_size_is_refused_before_it_is_made(tmp_path):
    path = write(tmp_path / "weights", weight=tensor(shape=(2**20, 2**20), stride=(0, 0)))
    with pytest.raises(CheckpointError, match="larger than the file"):
        read_everything(path)


def test_archives_that_torch_does_not_write_are_refused(tmp_path):
    path = tmp_path / "weights"
    with pytest.raises(CheckpointError, match="compressed or encrypted"):
        open_checkpoint(write(path, method=zipfile.ZIP_DEFLATED))
    with pytest.raises(CheckpointError, match="big-endian"):
        open_checkpoint(write(path, order=b"big"))
    write(path)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data/0", bytes(16))
    with pytest.raises(CheckpointError, match="one is there twice"):
        open_checkpoint(path)


def test_members_that_share_their_bytes_are_refused(tmp_path):
    """Many tensors in few bytes: 40 directory entries for one member of a kilobyte."""
    path = tmp_path / "weights"
    names = [f"archive/data/{n:02}" for n in range(40)]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", state_dict(weight=tensor(key="00", numel=256)))
        archive.writestr(names[0], bytes(1024))
        first = archive.getinfo(names[0])
        archive.filelist += [zipfile.ZipInfo(name) for name in names[1:]]
        for info in archive.filelist[2:]:
            info.header_offset, info.CRC = first.header_offset, first.CRC
            info.file_size = info.compress_size = 1024
    with pytest.raises(CheckpointError, match="its members overlap"):
        open_checkpoint(path)


def entry(shape="[4]", offsets="[0,16]", dtype='"F32"') -> str:
    return f'{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}'


@pytest.mark.parametrize(
    "header",
    [
        f'{{"a":{entry("[5]")}}}', f'{{"a":{entry("[3]")}}}', f'{{"a":{entry("[4]", "[0,20]")}}}',
        f'{{"a":{entry("[4]", "[4,20]")}}}', f'{{"a":{entry("[4]", "[16,0]")}}}', f'{{"a":{entry("[-4]")}}}',
        f'{{"a":{entry("[4611686018427387904,4]")}}}', f'{{"a":{entry("[" + "9" * 100_000 + "]")}}}',
        f'{{"a":{entry(dtype=chr(34) + "F9" + chr(34))}}}',
        f'{{"a":{entry("[2]", "[0,8]")},"b":{entry()}}}', '{"a":5}', '{"a":', '{"a":' + "[" * 100_000,
    ],
    ids=lambda header: header[:60],
)  # fmt: skip
def test_a_safetensors_header_that_lies_is_refused(tmp_path, header):
    (tmp_path / "weights").write_bytes(struct.pack("<Q", len(header)) + header.encode() + WEIGHT)
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / "weights")


# Memory and time

N = 4000
BOMBS = {
    "memo index": b"Nr\xff\xff\xff\xff0",
    "long text": b"\x8d\x00\x00\x00\x00\x40\x00\x00\x00",
    "long bytearray": b"\x96\x00\x00\x00\x00\x40\x00\x00\x00",
    "long number": b"\x8b\xff\xff\xff\x7f",
    "digits": b"I" + b"9" * (10 * N) + b"\n",
    "wide text": b"X" + struct.pack("<I", 4 * N + 4) + b"a" * (4 * N) + "\U0001f600".encode(),
    "nested tuples as a key": b"}" + b")" + b"\x85" * 40 * N + b"Ns",
    "nested tuples in a set": b"\x8f()" + b"\x85" * 40 * N + b"\x90",
    "laughing tuples as a key": b"})q\x00"
    + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60)) + b"Ns",
    "laughing tuples with a state": b"})q\x00"
    + b"".join(b"h%ch%c\x86Nbq%c" % (i, i, i + 1) for i in range(60)) + b"Ns",
    "laughing lists": b"]q\x00" + b"".join(b"](" + b"h%c" % i * 100 + b"eq%c" % (i + 1) for i in range(100)),
    "dicts": b"](" + b"}" * (5 * N) + b"e",
    "ordered dicts": b"ccollections\nOrderedDict\nq\x00](" + b"h\x00)R" * N + b"e",
    "foreign names": b"](" + b"".join(b"c%d\nn\n" % n for n in range(N)) + b"e",
    "a number as an index": b"N" + b"\x94" * (5 * N),
    "described tensors": tensor() + b"q\x00](" + b"h\x00" * N + b"e",
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_memory_and_time_stay_in_proportion_to_the_file(tmp_path, bomb):
    path = write(tmp_path / "weights", bomb=BOMBS[bomb])
    tracemalloc.start()
    start = time.monotonic()
    try:
        read_everything(path)
    except CheckpointError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2**20 + 300 * path.stat().st_size
    assert time.monotonic() - start < 60  # on a busy machine; the worst would take years


@pytest.mark.parametrize(
    "program, reason",
    [
        (BOMBS["memo index"], "under a number that is far too large"),
        (BOMBS["laughing tuples as a key"], "a tuple of more than 1000 entries"),
        (BOMBS["laughing tuples with a state"], "a tuple of more than 1000 entries"),
        (BOMBS["foreign names"], "names more than 1000 foreign classes"),
        (b"](" + b"N" * 50_000 + b"e", "more than 50,000 opcodes"),
        (b"\x8e" + struct.pack("<Q", 2**24) + bytes(2**24), "data.pkl has more than 16,777,216 bytes"),
    ],
    ids=["memo index", "tuples", "tuples with a state", "names", "opcodes", "pickle"],
)
def test_a_bomb_is_refused_for_what_it_is(tmp_path, monkeypatch, program, reason):
    monkeypatch.setattr(pickles, "MAX_OPCODES", 50_000)
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(write(tmp_path / "weights", bomb=program))


# Any damage whatever


def mutated(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        position, count = draw.randrange(len(changed) or 1), draw.choice((1, 1, 2, 4, 8, 100))
        opcode = bytes([draw.choice(b"()tRcbQo.}]eu")])
        choices = (draw.randbytes(count), b"", b"\xff" * count, bytes(count), opcode)
        changed[position : position + count] = draw.choice(choices)
    return bytes(changed)


@pytest.mark.parametrize("name", ["zip", "safetensors"])
def test_damaged_files_are_read_or_refused_and_nothing_else(tmp_path, name):
    state = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor(1), "c": torch.ones(3).half()}
    if name == "safetensors":
        safetensors.torch.save_file(state, tmp_path / "sample")
    else:
        torch.save(
            {"state_dict": state, "callbacks": {"x": [None, (b"y", numpy.float32(2))]}}, tmp_path / "sample"
        )
    data = (tmp_path / "sample").read_bytes()
    draw, refused = random.Random(name), 0
    first = data.index(b"PK\x03\x04", 1) if name == "zip" else len(data)
    for trial in range(200):
        if trial % 2:  # half of the damage to the pickle alone, which is a small part
            damaged = mutated(data[:first], draw)[:first].ljust(first, b"\0") + data[first:]
        else:
            damaged = mutated(data, draw)
        (tmp_path / "damaged").write_bytes(damaged)
        try:
            read_everything(tmp_path / "damaged")
        except CheckpointError as error:
            assert str(tmp_path / "damaged") in str(error)
            refused += 1
    assert 20 < refused < 200


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names are POSIX's")
def test_a_pipe_or_a_device_is_an_error_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # whoever opened it would wait for ever for someone to write into it
    for attempt in (
        lambda: find_checkpoint(tmp_path, "pipe"),
        lambda: open_checkpoint(tmp_path / "pipe"),
        lambda: open_checkpoint("/dev/zero"),
    ):
        with pytest.raises(CheckpointError, match="a pipe or a device, not a file"):
            attempt()
