# SPDX-License-Identifier: Apache-2.0
"""Files behind http(s) URLs, with limits on size, time and redirects."""

from __future__ import annotations

import ipaddress
import re
import socket
import threading
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import IO, Any
from urllib.parse import urlsplit

from eloftr_ops._version import __version__
from eloftr_ops.errors import FileError

__all__ = ["MAX_BYTES", "MAX_REDIRECTS", "MAX_SECONDS", "download", "is_url", "refuse_private"]

MAX_BYTES = 64 * 2**20
MAX_SECONDS = 30.0  # from the call to the last byte
MAX_REDIRECTS = 5
_CHUNK = 2**16


def is_url(text: str) -> bool:
    """Whether it names something on the web, not a file."""
    return re.match(r"https?://", text, re.IGNORECASE) is not None


def refuse_private(url: str) -> None:
    """Refuse a host inside the own network, for servers that download what others name.

    Raises:
        FileError: an address of the host is not on the public internet.
    """
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(urlsplit(url).hostname or "", None)}
    except (OSError, ValueError):
        return  # no such host: the download says it in words
    if any(not ipaddress.ip_address(address.split("%")[0]).is_global for address in found):
        raise FileError(f"{url}: an address inside this server's network. Upload the image instead.")


def download(
    url: str,
    *,
    max_bytes: int = MAX_BYTES,
    max_seconds: float = MAX_SECONDS,
    max_redirects: int = MAX_REDIRECTS,
) -> bytes:
    """The content behind a URL.

    The limits hold for the whole call, whatever the server does: a server that sends a byte now and then is given up
    in time, too. A redirect may lead to http and https only. Proxies are taken from the environment.

    Args:
        url: http or https.
        max_bytes: the most bytes of content.
        max_seconds: the most seconds.
        max_redirects: the most redirects.

    Raises:
        FileError: no network, no such host, an error of the server, or a limit.
    """
    result: list[bytes | Exception] = []
    done = threading.Event()
    stop = threading.Event()

    def work() -> None:
        try:
            result.append(_read(url, max_bytes, max_seconds, max_redirects, stop))
        except Exception as error:
            result.append(error)
        finally:
            done.set()

    # No timeout of a socket bounds a whole call: it starts again with each byte.
    threading.Thread(target=work, daemon=True).start()
    if not done.wait(max_seconds):
        stop.set()
        raise FileError(f"{url}: took longer than {max_seconds:g} s. Download the file first.")
    content = result[0]
    if isinstance(content, bytes):
        return content
    if isinstance(content, FileError):
        raise content
    raise FileError(f"{url}: {_reason(content)}") from content


class _Redirects(urllib.request.HTTPRedirectHandler):
    def __init__(self, limit: int) -> None:
        self.limit, self.count = limit, 0

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        self.count += 1
        if self.count > self.limit:
            raise FileError(f"{req.full_url}: more than {self.limit} redirects.")
        if not is_url(newurl):
            raise FileError(f"{req.full_url}: redirects to {newurl}, which is no http(s) address.")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _read(url: str, max_bytes: int, seconds: float, redirects: int, stop: threading.Event) -> bytes:
    opener = urllib.request.build_opener(_Redirects(redirects))
    request = urllib.request.Request(url, headers={"User-Agent": f"eloftr-ops/{__version__}"})
    with opener.open(request, timeout=seconds) as response:
        parts, size = [], 0
        while not stop.is_set() and (part := response.read1(_CHUNK)):
            parts.append(part)
            size += len(part)
            if size > max_bytes:
                limit = f"{max_bytes / 2**20:.3g} MiB"
                raise FileError(f"{url}: larger than {limit}. Download the file first.")
        expected = response.headers.get("Content-Length")
        if expected is not None and expected.isdigit() and size < int(expected):
            raise FileError(f"{url}: the connection broke after {size} of {expected} bytes. Try again.")
    if not size:
        raise FileError(f"{url}: the server sent nothing.")
    return b"".join(parts)


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answered {error.code} ({error.reason or 'no reason given'})."
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, socket.gaierror):
        return "the host was not found. There is no network, or no such host."
    if isinstance(cause, TimeoutError):
        return "the server did not answer in time."
    if isinstance(cause, OSError):
        return f"the server cannot be reached: {cause.strerror or cause}. Is there a network?"
    if isinstance(cause, (HTTPException, ValueError)):
        return f"not a usable address or answer: {cause}."
    return f"the server cannot be reached: {cause}."
