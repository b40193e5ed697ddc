"""Bytes from paths, URLs and bytes: what is accepted, and what each failure says, and does not say."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from live_memory import memory_left
from PIL import Image

from modelscope_i2v.errors import InvalidInputError, MissingFileError, NotEnoughMemoryError
from modelscope_i2v.media.images import open_image
from modelscope_i2v.media.sources import read_source

SECRETS = ("secret", "token", "user", "anchor")


def png() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((7, 9), 50).save(file, "PNG")
    return file.getvalue()


PNG = png()


def read(source) -> bytes:
    return read_source(source, "image", 10_000)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path.partition("?")[0]
        if name == "/redirect":
            self.send_response(302)
            self.send_header("Location", "/image.png?token=secret")
            self.end_headers()
            return
        body = PNG if name in ("/image.png", "/unsized.png", "/cut") else None
        body = {"/empty": b"", "/page": b"<!DOCTYPE html><html>"}.get(name, body)
        self.send_response(404 if body is None else 200)
        if name != "/unsized.png":
            self.send_header("Content-Length", str(len(body or b"") + (10 if name == "/cut" else 0)))
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://user:secret@127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    thread.join()
    httpd.server_close()


@pytest.mark.parametrize(
    "name",
    ["a.png", "a b.png", 'it\'s "q";$(x).png', "-x.png", "ключ 图.png", "a\nb.png", "concat:x", "C:x.png"],
)
def test_any_file_name_is_ordinary(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(PNG)
    for source in (str(path), path, path.as_uri()):
        assert read(source) == PNG


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.png").write_bytes(PNG)
    assert read("~/a.png") == PNG


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_bytes(kind):
    assert read(kind(PNG)) == PNG


@pytest.mark.parametrize("path", ["/image.png?token=secret#anchor", "/redirect"])
def test_url(server, path):
    assert read(server + path) == PNG


@pytest.mark.parametrize(
    "path, words",
    [
        ("/none.png?token=secret#anchor", "none.png: the server answered 404 Not Found"),
        ("/empty?token=secret", "empty: the server sent 0 bytes"),
        ("/page?token=secret", "seems to be an HTML page"),
        ("/cut?token=secret", "cut: "),
    ],
)
def test_url_that_gives_no_image(server, path, words):
    with pytest.raises(InvalidInputError) as caught:
        open_image(server + path)
    assert words in str(caught.value)
    assert not any(secret in str(caught.value) for secret in SECRETS)
    assert caught.value.__cause__ is None or "secret" not in str(caught.value.__cause__)


def test_url_that_cannot_be_reached(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    with pytest.raises(InvalidInputError, match="http://127.0.0.1:9/a.png: Connection refused") as caught:
        open_image("http://user:secret@127.0.0.1:9/a.png?token=secret#anchor")
    assert not any(secret in str(caught.value) for secret in SECRETS)
    assert caught.value.__context__ is None  # no traceback through requests, which shows the whole URL


@pytest.mark.parametrize("name", ["image.png", "unsized.png"])
def test_size_limit(server, tmp_path, name):
    (tmp_path / name).write_bytes(PNG)
    for source in (f"{server}/{name}", tmp_path / name, PNG):
        with pytest.raises(InvalidInputError, match="is larger than the 50 bytes allowed"):
            read_source(source, "image", 50)
        assert read_source(source, "image", len(PNG)) == PNG


@pytest.mark.parametrize(
    "url", ["ftp://user:secret@h/a.png?token=1", "s3://bucket/a", "data:image/png;base64,AAAA"]
)
def test_other_schemes_are_refused(url):
    with pytest.raises(InvalidInputError, match="not among the schemes allowed, http, https, file") as caught:
        open_image(url)
    assert not any(secret in str(caught.value) for secret in (*SECRETS, "AAAA"))


def test_file_url_of_another_machine():
    with pytest.raises(InvalidInputError, match="names this machine only"):
        open_image("file://other/a.png")


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "file").write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe")
    for path, words in [
        (tmp_path, "is a folder, not a file"),
        (tmp_path / "empty.png", "is an empty file"),
        (tmp_path / "file" / "a.png", "Not a directory"),
        ("/dev/zero", "is not a regular file"),
        (tmp_path / "pipe", "is not a regular file"),
        ("~\0/a.png", "null"),
        ("a\0b.png", "null"),
        ("x" * 5000, "File name too long"),
        ("", "empty string"),
    ]:
        with pytest.raises(InvalidInputError, match=words) as caught:
            open_image(path)
        assert len(str(caught.value)) < 500
    with pytest.raises(MissingFileError, match="'.*none.png' does not exist"):
        open_image(tmp_path / "none.png")


def test_no_permission(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(PNG)

    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)  # root may read anything, so the mode would prove nothing
    with pytest.raises(InvalidInputError, match="a.png': Permission denied"):
        open_image(tmp_path / "a.png")


def test_values_that_fail_when_they_are_looked_at():
    released = memoryview(b"abc")
    released.release()

    class BadPath(os.PathLike):
        def __fspath__(self):
            raise RuntimeError("no")

    for source, words in ((released, "a memoryview.*released"), (BadPath(), "a BadPath.*no")):
        with pytest.raises(InvalidInputError, match=f"cannot read the image .{words}"):
            open_image(source)


def test_memory_that_runs_out(tmp_path):
    path = tmp_path / "a.png"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    with (
        memory_left(1 << 28),
        pytest.raises(NotEnoughMemoryError, match="a.png' needs more memory"),
    ):
        read_source(path, "image", 1 << 31)
    # In a process of its own: what other tests gave back to the allocator would be taken again.
    code = """if True:
        import io
        from PIL import Image
        from live_memory import memory_left
        from modelscope_i2v.media.images import open_image
        white = io.BytesIO()
        Image.new("1", (10_000, 8_000)).save(white, "PNG")
        with memory_left(1 << 26):
            open_image(white.getvalue())
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert re.search(r"NotEnoughMemoryError: the image \(.* needs more memory", done.stderr)
