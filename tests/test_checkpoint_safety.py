"""Code in a weights file: nothing of it runs.

That each attack is one is checked too: the standard unpickler falls for it.
"""

from __future__ import annotations

import contextlib
import pickle
from io import BytesIO

import numpy
import pytest
import torch
from hostile_files import WEIGHT, WRITERS, legacy_file, read_everything, state_dict, tensor, text, write
from torch import nn

from modelscope_i2v.errors import CheckpointError
from modelscope_i2v.weights import load_weights, open_checkpoint

each_container = pytest.mark.parametrize("container", WRITERS)


@each_container
def test_a_hand_written_file_is_read(tmp_path, container):
    path = write(container, tmp_path / "weights", {})
    assert read_everything(path)["weight"].tolist() == [1, 2, 3, 4]
    assert torch.load(path, weights_only=True)["weight"].tolist() == [1, 2, 3, 4]


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
    "posix.system": lambda p: b"cposix\nsystem\n" + command(p) + b"\x85R",
    "eval": lambda p: b"cbuiltins\neval\n" + source(p) + b"\x85R",
    "eval of Python 2": lambda p: b"c__builtin__\neval\n" + source(p) + b"\x85R",
    "exec by stack global": lambda p: text("builtins") + text("exec") + b"\x93" + source(p) + b"\x85R",
    "dotted name": lambda p: b"\x80\x04" + text("torch.serialization") + text("os.system") + b"\x93"
    + command(p) + b"\x85R",
    "inst": lambda p: b"(" + command(p) + b"ios\nsystem\n",
    "obj": lambda p: b"(csubprocess\ncall\n" + text("touch") + b"0](" + text("touch") + text(p) + b"eo",
    "getattr chain": lambda p: b"cbuiltins\ngetattr\ncbuiltins\n__import__\n" + text("os") + b"\x85R"
    + text("system") + b"\x86R" + command(p) + b"\x85R",
    "map": lambda p: b"cbuiltins\nlist\ncbuiltins\nmap\ncbuiltins\neval\n](" + source(p) + b"e\x86R\x85R",
    "through the memo": lambda p: b"cos\nsystem\nq\x800" + command(p) + b"q\x810h\x80h\x81\x85R",
    "reduce": lambda p: opcodes(Touch(p)),
    "reduce, protocol 5": lambda p: b"\x80\x05" + opcodes(Touch(p), 5),
    "setstate": lambda p: opcodes(TouchOnState(p)),
    "setitem": items,
    "pickle in a pickle": lambda p: b"cpickle\nloads\n" + opcodes(pickle.dumps(Touch(p)), 3) + b"\x85R",
    "torch.load in a pickle": lambda p: b"ctorch.storage\n_load_from_bytes\n"
    + opcodes(saved_by_torch({"w": Touch(p)}), 3) + b"\x85R",
    "numpy array of objects": object_array,
    "as a dict's key": lambda p: b"}" + b"cos\nsystem\n" + command(p) + b"\x85RNs",
    "in a list in a set": lambda p: b"\x80\x04\x8f(cbuiltins\neval\n" + source(p) + b"\x85R\x90",
    "as a hook": lambda p: b"ctorch._utils\n_rebuild_parameter\nN\x89" + opcodes(Touch(p)) + b"\x87R",
}  # fmt: skip


@each_container
@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_in_a_file_runs(tmp_path, container, attack):
    canary = tmp_path / "canary"
    program = ATTACKS[attack](str(canary))
    try:
        pickle.loads(b"\x80\x02" + program + b".")
    except Exception:
        assert attack == "as a hook"  # which fails in torch's function, but only after the damage
    assert canary.exists(), "this attack is none"
    canary.unlink()

    path = write(container, tmp_path / "weights", {"evil": program})
    assert read_everything(path)["weight"].tolist() == [1, 2, 3, 4]
    module = nn.Module()
    module.weight = nn.Parameter(torch.empty(4, device="meta"))
    module.evil = nn.Parameter(torch.empty(4, device="meta"))
    with pytest.raises(CheckpointError, match="1 keys that hold no plain tensor .'evil: "):
        load_weights(module, path)
    whole = WRITERS[container](tmp_path / "whole", b"\x80\x02" + program + b".", {})
    with contextlib.suppress(CheckpointError):
        assert not read_everything(whole)
    assert not canary.exists()


def test_pickles_that_come_before_and_behind_the_state_are_read_as_carefully(tmp_path):
    canary = tmp_path / "canary"
    attack = b"\x80\x02" + opcodes(Touch(str(canary))) + b"."
    path = legacy_file(tmp_path / "weights", state_dict(weight=tensor(legacy=True)), {"0": WEIGHT})
    pickles = path.read_bytes()
    for i, end in enumerate(find_ends(pickles)):
        path.write_bytes((b"" if i == 0 else pickles[: end[0]]) + attack + pickles[end[1] :])
        with pytest.raises(CheckpointError):
            open_checkpoint(path)
    assert i == 4 and not canary.exists()


def find_ends(data: bytes) -> list[tuple[int, int]]:
    """Where each of the five pickles of a legacy file begins and ends."""
    stream, ends = BytesIO(data), []
    for _ in range(5):
        begin = stream.tell()
        unpickler = pickle._Unpickler(stream)
        unpickler.persistent_load = lambda identity: torch.UntypedStorage(16)
        try:
            unpickler.load()
        except AttributeError:  # torch wants a typed storage there
            stream.seek(data.index(b"u.", begin) + 2)
        ends.append((begin, stream.tell()))
    return ends
