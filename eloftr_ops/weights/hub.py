# SPDX-License-Identifier: Apache-2.0
"""Files of a Hugging Face Hub repository, through the Hub's own cache."""

from __future__ import annotations

import functools
import os
import re
import socket
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import NamedTuple

from eloftr_ops.weights.files import WeightsNotFoundError

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PATIENCE = 5.0  # seconds for a connection
_REMEMBERED = 30.0  # seconds that an answer counts
_COMMIT = re.compile(r"[0-9a-f]{40}")


class Repository(NamedTuple):
    """Where on the Hub, and how to get there."""

    name: str
    revision: str | None
    cache_dir: str | os.PathLike[str] | None
    local_files_only: bool

    def fetch(self, file: str) -> Path:
        """Path of a file in the cache, downloaded if need be.

        Raises:
            WeightsNotFoundError: unknown repository, revision or file, or no way to reach them.
        """
        import huggingface_hub
        from huggingface_hub import constants

        offline = self.local_files_only or constants.HF_HUB_OFFLINE or not can_connect(constants.ENDPOINT)
        try:
            path = huggingface_hub.hf_hub_download(
                self.name,
                file,
                revision=self.revision,
                cache_dir=None if self.cache_dir is None else Path(self.cache_dir),
                local_files_only=offline,
            )
        except (OSError, ValueError) as error:
            raise WeightsNotFoundError(self._advice(file, error)) from error
        return Path(path)

    def try_fetch(self, file: str) -> Path | None:
        """As :meth:`fetch`; None where the repository, or the cache without a connection, has no such file."""
        from huggingface_hub.errors import EntryNotFoundError

        try:
            return self.fetch(file)
        except WeightsNotFoundError as error:
            if isinstance(error.__cause__, EntryNotFoundError):
                return None
            raise

    def pinned(self, fetched: Path) -> Repository:
        """The same repository at the commit a file came from, so that the next file is of the same commit."""
        commit = fetched.parent.name
        return self._replace(revision=commit) if _COMMIT.fullmatch(commit) else self

    def _advice(self, file: str, error: Exception) -> str:
        revision = f" at revision {self.revision}" if self.revision else ""
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return (
            f"{self.name}{revision}: could not get {file} from the Hugging Face Hub or its cache "
            f"({type(error).__name__}: {reason}) Check the name, the revision and the connection; without one, "
            f"download on another machine (hf download {self.name} --local-dir FOLDER), copy the folder here and "
            "pass its path."
        )


def is_repository(name: str) -> bool:
    """Whether ``name`` reads as ``organisation/repository``."""
    return _REPOSITORY.fullmatch(name) is not None


@functools.lru_cache(maxsize=1)
def _reachable(host: str, port: int, _moment: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=_PATIENCE):
            return True
    except OSError:
        return False


def can_connect(endpoint: str) -> bool:
    """Whether the Hub, or the proxy on the way to it, answers; the Hub's client would try for half a minute."""
    address = urllib.parse.urlsplit(endpoint)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(address.scheme) or proxies.get("all")
    if proxy is not None and not urllib.request.proxy_bypass(address.hostname or ""):
        address = urllib.parse.urlsplit(proxy if "//" in proxy else f"//{proxy}")
    port = address.port or (80 if address.scheme == "http" else 443)
    return _reachable(address.hostname or "", port, int(time.monotonic() // _REMEMBERED))
