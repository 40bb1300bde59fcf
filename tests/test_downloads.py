# SPDX-License-Identifier: Apache-2.0
"""URLs, against a server on this machine: what is read, and each limit."""

from __future__ import annotations

import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources

import pytest

from eloftr_ops.downloads import download, is_url
from eloftr_ops.errors import FileError
from eloftr_ops.io import read_image

JPEG = (resources.files("eloftr_ops") / "assets" / "demo_0.jpg").read_bytes()


class Handler(BaseHTTPRequestHandler):
    """A photograph, a page, and everything that a server can do wrong."""

    def do_GET(self) -> None:
        path = self.path.strip("/")
        if path.startswith("hop"):
            count = int(path.removeprefix("hop"))
            self.answer(302, b"", Location=f"/hop{count - 1}" if count > 1 else "/photo.jpg")
        elif path == "file":
            self.answer(302, b"", Location="file:///etc/hostname")
        elif path == "slow":
            self.send_response(200)
            self.end_headers()
            for _ in range(30):
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.1)
        elif path == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"x" * 10)
        else:
            known = {"photo.jpg": JPEG, "page": b"<html>no image</html>", "empty": b""}
            self.answer(200 if path in known else 404, known.get(path, b""))

    def answer(self, code: int, content: bytes, **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.daemon_threads = True
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_urls_are_told_from_paths() -> None:
    assert is_url("http://host/a.png")
    assert is_url("HTTPS://host/a.png")
    assert not is_url("https:/host/a.png")
    assert not is_url("ftp://host/a.png")
    assert not is_url("a.png")


def test_an_image_behind_a_url_is_read(server: str) -> None:
    assert read_image(f"{server}/photo.jpg").size_wh == (640, 480)
    assert read_image(f"{server}/hop5", resize=320).size_wh == (320, 240)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("page", "not an image of a known format"),
        ("empty", "the server sent nothing"),
        ("missing.jpg", "the server answered 404"),
        ("hop6", "more than 5 redirects"),
        ("file", "url 'file:///etc/hostname' is not allowed"),
        ("cut", "the connection broke after 10 of 1000 bytes"),
    ],
)
def test_what_a_server_does_wrong_is_named(server: str, path: str, message: str) -> None:
    with pytest.raises(FileError, match=message) as error:
        read_image(f"{server}/{path}")
    assert "\n" not in str(error.value)


def test_size_and_time_are_bounded(server: str) -> None:
    with pytest.raises(FileError, match=r"larger than 0\.00\d+ MiB"):
        download(f"{server}/photo.jpg", max_bytes=len(JPEG) // 10)
    start = time.monotonic()
    with pytest.raises(FileError, match=r"took longer than 0\.3 s"):
        download(f"{server}/slow", max_seconds=0.3)
    assert time.monotonic() - start < 2


def test_no_server_and_no_network_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(FileError, match="the server cannot be reached: Connection refused"):
        read_image(f"http://127.0.0.1:{port}/a.png")

    def no_network(*_: object, **__: object) -> None:
        raise urllib.error.URLError(socket.gaierror(-3, "Temporary failure in name resolution"))

    monkeypatch.setattr(urllib.request.OpenerDirector, "open", no_network)
    with pytest.raises(FileError, match="There is no network, or no such host"):
        read_image("https://example.org/a.png")


@pytest.mark.parametrize("url", ["http://", "http://[::1", "http://host:port/a.png", "http://a b/c.png"])
def test_an_address_that_is_none_is_named(url: str) -> None:
    with pytest.raises(FileError) as error:
        download(url, max_seconds=5)
    assert str(error.value).startswith(f"{url}: ")
