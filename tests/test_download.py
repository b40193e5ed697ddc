"""Downloads from servers that mean harm: bounded in time, in memory and in where they lead."""

from __future__ import annotations

import gzip
import itertools
import socket
import threading
import time
import tracemalloc
from contextlib import contextmanager, suppress
from typing import Iterable, Iterator

import pytest

from modelscope_i2v.errors import InvalidInputError
from modelscope_i2v.media import download as module
from modelscope_i2v.media.download import download

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
REDIRECT = b"HTTP/1.1 302 Found\r\nLocation: %s\r\n\r\n"


@contextmanager
def server(*answers: Iterable[bytes]) -> Iterator[str]:
    """The address of a server that gives the n-th connection the n-th answer, and then the last again."""
    listener, stop = socket.create_server(("127.0.0.1", 0)), threading.Event()
    following = itertools.chain(answers, itertools.repeat(answers[-1]))

    def answer(connection: socket.socket, parts: Iterable[bytes]) -> None:
        with connection, suppress(OSError):
            connection.recv(10_000)
            for part in parts:
                connection.sendall(part)
                if stop.is_set():
                    return

    def serve() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=answer, args=(connection, next(following)), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://us3r:passw0rd@127.0.0.1:{listener.getsockname()[1]}/a.png?sig=s3cret"
    finally:
        stop.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


class Endless:
    """A beginning, and then a piece again and again: as fast as may be, or with a pause before each."""

    def __init__(self, beginning: bytes, piece: bytes, pause: float):
        self.beginning, self.piece, self.pause = beginning, piece, pause

    def __iter__(self) -> Iterator[bytes]:
        yield self.beginning
        while True:
            time.sleep(self.pause)
            yield self.piece if self.pause else self.piece * (-(-50_000 // len(self.piece)))


def refused(url: str, max_bytes: int = 1000) -> str:
    with pytest.raises(InvalidInputError) as caught:
        download(url, "image", max_bytes)
    text = str(caught.value)
    assert text.startswith("cannot fetch the image http://127.0.0.1:")
    assert not any(secret in text for secret in ("us3r", "passw0rd", "s3cret"))
    assert caught.value.__cause__ is caught.value.__context__ is None
    return text


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")


ENDLESS = {
    "status line": (b"", b"H"),
    "header": (OK + b"X: ", b"x"),
    "headers": (OK, b"X: x\r\n"),
    "interim answers": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "body": (OK + b"\r\n", b"x"),
    "chunks": (CHUNKED, b"1\r\nx\r\n"),
    "chunk extension": (CHUNKED + b"1;", b"x"),
    "chunk of negative size": (CHUNKED + b"-1\r\n", b"x"),
    "trailer": (CHUNKED + b"1\r\nx\r\n0\r\nX: ", b"x"),
    "trailers": (CHUNKED + b"1\r\nx\r\n0\r\n", b"X: x\r\n"),
    "body of an error": (b"HTTP/1.1 404 Not Found\r\n\r\n", b"x"),
    "body of a redirect": (REDIRECT % b"/a", b"x"),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_drips_end_at_the_deadline(monkeypatch, kind):
    monkeypatch.setattr(module, "DOWNLOAD_TIMEOUT", 0.4)
    start = time.monotonic()
    with server(Endless(*ENDLESS[kind], pause=0.02)) as url:
        words = refused(url, 1_000_000)
    assert time.monotonic() - start < 2
    assert "not complete after 0.4 s" in words or kind.startswith("body of")


@pytest.mark.parametrize("kind", ENDLESS)
def test_floods_end_at_the_size(monkeypatch, kind):
    monkeypatch.setattr(module, "DOWNLOAD_TIMEOUT", 60)
    start = time.monotonic()
    tracemalloc.start()
    try:
        with server(Endless(*ENDLESS[kind], pause=0)) as url:
            refused(url)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()
    assert time.monotonic() - start < 20


def test_silence_ends_at_the_read_timeout(monkeypatch):
    monkeypatch.setattr(module, "READ_TIMEOUT", 0.2)
    with server(Endless(b"", b"x", pause=2)) as url:
        assert "imed out" in refused(url) or "Timeout" in refused(url)


@pytest.mark.parametrize("answer", [OK, REDIRECT[:-2] % b"/a"], ids=["body", "redirect"])
def test_compressed_answers_are_not_decoded(answer):
    bomb = gzip.compress(gzip.compress(bytes(100_000_000)))
    parts = [answer + b"Content-Encoding: gzip, gzip\r\nContent-Length: %d\r\n\r\n" % len(bomb), bomb]
    tracemalloc.start()
    try:
        with server(parts) as url:
            words = refused(url)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()
    assert ("compressed (gzip, gzip)" if answer == OK else "more than 10 redirects") in words


@pytest.mark.parametrize(
    "target", [b"file:///etc/passwd", b"ftp://us3r:passw0rd@h/a?sig=s3cret", b"data:text/x,a"]
)
def test_redirects_lead_to_nothing_but_http(target):
    with server([REDIRECT % target]) as url:
        assert "it redirects to '" in refused(url)


@pytest.mark.parametrize("count", [10, 11])
def test_ten_redirects_are_followed(count):
    answers = [[REDIRECT % b"/next?sig=s3cret"]] * count + [[OK + b"Content-Length: 3\r\n\r\nabc"]]
    with server(*answers) as url:
        if count <= 10:
            assert download(url, "image", 1000) == b"abc"
        else:
            assert "more than 10 redirects" in refused(url)


@pytest.mark.parametrize(
    "answer, words",
    [
        (OK + b"Content-Length: 10\r\n\r\nabcdef", "cut short|ended after 6 of 10 bytes"),
        (CHUNKED + b"9\r\nabcdef", "cut short"),
        (OK + b"Content-Length: 0\r\n\r\n", "the server sent 0 bytes"),
        (OK + b"Content-Length: 9999999\r\n\r\n", "it is larger than the 1,000 bytes allowed"),
        (OK + b"\r\n" + bytes(1001), "it is larger than the 1,000 bytes allowed"),
        (b"", "cut short"),
        (b"SSH-2.0\r\n", "not valid HTTP"),
        (b"HTTP/1.1 404 Not Found\r\n\r\n", "the server answered 404 Not Found"),
        (b"HTTP/1.1 302 Found\r\n\r\n", "the server answered 302 Found"),
    ],
)
def test_answers_that_are_no_file(answer, words):
    with server([answer]) as url:
        refused_with = refused(url)
    assert any(each in refused_with for each in words.split("|"))


@pytest.mark.parametrize("body", [b"Content-Length: 1000\r\n\r\n" + bytes(1000), b"\r\n" + bytes(1000)])
def test_a_file_of_the_size_allowed(body):
    with server([OK + body]) as url:
        assert download(url, "image", 1000) == bytes(1000)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_is_bounded_too(monkeypatch, scheme):
    monkeypatch.setattr(module, "DOWNLOAD_TIMEOUT", 0.4)
    monkeypatch.delenv("NO_PROXY")
    start = time.monotonic()
    with server(Endless(b"", b"H", pause=0.02)) as url:
        monkeypatch.setenv(f"{scheme}_proxy", url.partition("/a.png")[0])
        with pytest.raises(InvalidInputError, match="not complete after 0.4 s"):
            download(f"{scheme}://host.invalid/a.png", "image", 1000)
    assert time.monotonic() - start < 2
