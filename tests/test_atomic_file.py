"""A file is there complete, or as it was: whatever happens to the process that writes it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from modelscope_i2v.errors import OutputError
from modelscope_i2v.media.files import absolute_path, atomic_file, check_replaceable

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["a", "a b", 'it\'s "q";$(x)', "-x", "ключ 图", "a\nb", "x" * 255, "%d", ".hidden", "concat:a|b"]


def write(path, data: bytes) -> None:
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        file.write(data)


@contextmanager
def unprivileged():
    """As an ordinary user, where the tests run as root, who may do anything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("name", NAMES)
def test_any_name(tmp_path, name):
    path = tmp_path / name
    for data in (b"one", b"two"):
        check_replaceable(path)
        write(path, data)
        assert path.read_bytes() == data
        assert os.listdir(tmp_path) == [name]


def test_kinds_of_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for path in ("~/a", "b", tmp_path / "c", os.fsencode(tmp_path / "d"), os.fsencode(tmp_path) + b"/\xff"):
        write(path, b"x")
    assert sorted(os.listdir(os.fsencode(tmp_path))) == [b"a", b"b", b"c", b"d", b"\xff"]


def test_missing_folders_are_created_only_by_writing(tmp_path):
    path = tmp_path / "new" / "deep er" / "a"
    check_replaceable(path)
    assert not os.listdir(tmp_path)
    write(path, b"x")
    assert path.read_bytes() == b"x"


def test_nothing_is_there_before_the_end(tmp_path):
    path = tmp_path / "a"
    with atomic_file(path) as temporary:
        assert not path.exists()
        assert os.path.dirname(temporary) == str(tmp_path)
    assert path.read_bytes() == b""


@pytest.mark.parametrize("exception", [KeyboardInterrupt, SystemExit, ValueError, FileNotFoundError])
@pytest.mark.parametrize("old", [None, b"old"])
def test_an_exception_leaves_everything_as_it_was(tmp_path, exception, old):
    path = tmp_path / "a"
    if old:
        path.write_bytes(old)
    with pytest.raises(exception) as caught, atomic_file(path) as temporary:
        Path(temporary).write_bytes(b"half")
        raise exception
    assert type(caught.value) is exception
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == ({"a": old} if old else {})


def test_permissions(tmp_path):
    path = tmp_path / "a"
    old = os.umask(0o027)
    try:
        write(path, b"x")
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o640
    path.chmod(0o604)
    write(path, b"y")
    assert path.stat().st_mode & 0o777 == 0o604


def test_symbolic_links_are_written_through(tmp_path):
    (tmp_path / "real").mkdir()
    link = tmp_path / "link"
    link.symlink_to("real/a")
    for data in (b"one", b"two"):
        write(link, data)
        assert link.is_symlink() and (tmp_path / "real" / "a").read_bytes() == data
    assert os.listdir(tmp_path / "real") == ["a"]


@pytest.mark.parametrize("act", [check_replaceable, lambda path: write(path, b"x")], ids=["check", "write"])
def test_targets_that_cannot_be_written(tmp_path, act):
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    before = sorted(os.listdir(tmp_path))
    for path, words in [
        (tmp_path, "it is a folder"),
        (str(tmp_path / "new") + "/", "names a folder"),
        (".", "names a folder"),
        (tmp_path / "file" / "a", "Not a directory"),
        (tmp_path / "loop", "symbolic links"),
        (tmp_path / "pipe", "not a regular file"),
        ("/dev/null", "not a regular file"),
        (tmp_path / ("x" * 256), "File name too long"),
        ("a\0b", "null"),
        ("~\0/a", "null"),
        ("", "empty"),
        (None, "NoneType: give a path"),
        (3.5, "float: give a path"),
    ]:
        with pytest.raises(OutputError, match=words) as caught:
            act(path)
        assert not isinstance(path, (str, Path)) or repr(str(path)) in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == before and (tmp_path / "file").read_bytes() == b"old"


URL = "https://us3r:passw0rd@h/a/b.mp4?sig=s3cret"
URLS = [URL, Path(URL), f"./{Path(URL)}", f" {URL}", f"\n'{URL}'", URL.encode(), "s3://bucket/a",
        Path("s3://bucket/a"), "https://us3r:passw0rd/x@h/a", "FILE:///tmp/a", "data:a/b;s3cret"]  # fmt: skip


@pytest.mark.parametrize("path", URLS, ids=range(len(URLS)))
@pytest.mark.parametrize("act", [check_replaceable, lambda path: write(path, b"x")], ids=["check", "write"])
def test_a_url_is_no_path(tmp_path, monkeypatch, path, act):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="it is a URL: give a path") as caught:
        act(path)
    assert not any(secret in str(caught.value) for secret in ("us3r", "passw0rd", "s3cret"))
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("act", [check_replaceable, lambda path: write(path, b"x")], ids=["check", "write"])
def test_no_permission(tmp_path, act):
    for folder in (tmp_path, *tmp_path.parents):
        if not folder.stat().st_mode & 0o001:
            folder.chmod(0o755)
    (tmp_path / "a").write_bytes(b"old")
    tmp_path.chmod(0o555)
    with unprivileged(), pytest.raises(OutputError, match="new/b': Permission denied"):
        act(tmp_path / "new" / "b")
    tmp_path.chmod(0o777)
    (tmp_path / "a").chmod(0o444)
    with unprivileged(), pytest.raises(OutputError, match="a': the file is write-protected"):
        act(tmp_path / "a")
    tmp_path.chmod(0o755)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"a": b"old"}


@pytest.mark.parametrize("step", ["fsync", "replace", "open"])
def test_a_failing_disk(tmp_path, monkeypatch, step):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OutputError, match="a': No space left on device"), atomic_file(path):
        pass
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"a": b"old"}


def test_the_file_of_another_writer_is_left_alone(tmp_path, monkeypatch):
    def unknown(pid: int, sent: int) -> None:
        raise ProcessLookupError(pid)

    with atomic_file(tmp_path / "a") as temporary:
        monkeypatch.setattr(os, "kill", unknown)  # as in a container with process numbers of its own
        check_replaceable(tmp_path / "b")
        write(tmp_path / "b", b"x")
        assert os.path.exists(temporary)


def test_a_relative_path_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real/deep")
    for path in ("a", "./a", "new/../a", Path("a"), b"a", "link/../a"):
        assert absolute_path(path) == os.path.join(tmp_path, os.fsdecode(path))
    assert absolute_path(tmp_path / "a") == str(tmp_path / "a")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert absolute_path("~/a") == str(tmp_path / "a")
    with pytest.raises(OutputError, match="it is a URL"):
        absolute_path("https://host/a.mp4")


CHILD = """
import sys, time
from modelscope_i2v.media.files import atomic_file
with atomic_file(sys.argv[1]) as temporary, open(temporary, "wb", buffering=0) as file:
    while True:
        file.write(b"new" * 1000)
        time.sleep(0.001)
"""


# A child of something that runs in the background ignores SIGINT from the start, and Python then goes on so.
HEAR_INTERRUPTS = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"


def python(code: str, *args) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", HEAR_INTERRUPTS + code, *map(str, args)], cwd=ROOT)


@pytest.mark.parametrize("old", [None, b"old"])
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_process(tmp_path, sent, old):
    path = tmp_path / "a"
    if old:
        path.write_bytes(old)
    child = python(CHILD, path)
    deadline = time.monotonic() + 30
    while not any(p.suffix == ".part" and p.stat().st_size for p in tmp_path.iterdir()):
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.005)
    child.send_signal(sent)
    child.wait(timeout=30)
    names = {p.name for p in tmp_path.iterdir()} - {"a"}
    assert len(names) == (1 if sent == signal.SIGKILL else 0)
    assert (path.read_bytes() if path.exists() else None) == old
    write(path, b"next")
    assert set(os.listdir(tmp_path)) == {"a"} | names and path.read_bytes() == b"next"


RIVAL = """
import sys
from modelscope_i2v.media.files import atomic_file
for _ in range(60):
    with atomic_file(sys.argv[1]) as temporary, open(temporary, "wb", buffering=0) as file:
        for _ in range(20):
            file.write(sys.argv[2].encode() * 500)
"""


def test_two_processes_never_mix(tmp_path):
    path = tmp_path / "a"
    rivals = [python(RIVAL, path, letter) for letter in "AB"]
    seen = set()
    while any(rival.poll() is None for rival in rivals):
        if path.exists():
            seen.add(path.read_bytes())
    assert [rival.returncode for rival in rivals] == [0, 0]
    assert seen <= {b"A" * 10_000, b"B" * 10_000} and seen
    assert os.listdir(tmp_path) == ["a"]
