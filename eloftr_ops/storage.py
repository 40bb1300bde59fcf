# SPDX-License-Identifier: Apache-2.0
"""Writing files so that a kill, a full disk or a second writer never leaves half of one.

A file is written under a temporary name in its own folder, and then takes its name in one step. The temporary lies in
the same folder because a move between two file systems is not one step, and because the folder above may be read-only.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import filelock

__all__ = [
    "FolderInUseError",
    "folder_lock",
    "remove_leftovers",
    "temporary_name",
    "write_file",
    "write_folder",
]

_LOCK_TIMEOUT = 600.0  # seconds; writing a folder takes a few
_STALE_AFTER = 86400.0  # seconds, for temporary files of another machine
_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
_TEMPORARY = re.compile(r"\.eloftr-ops-([0-9a-f]{8})-(\d+)-[0-9a-f]{8}\.tmp")


class FolderInUseError(ValueError):
    """Another process works in the folder."""


def temporary_name(path: Path) -> Path:
    """A name in the folder of ``path`` for a file that is being written.

    Its length does not depend on that of ``path``. It tells machine and process, so that :func:`remove_leftovers`
    knows when nobody writes it any more.
    """
    return path.with_name(f".eloftr-ops-{_HOST}-{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files of writers that were killed; files of other names stay."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            match = _TEMPORARY.fullmatch(path.name)
            if match and _is_stale(path, match[1], int(match[2])):
                with contextlib.suppress(OSError):
                    path.unlink()


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole: what was at ``path`` stays until the new content is on disk.

    Raises:
        OSError: the folder cannot be made or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    temporary = temporary_name(path)
    try:
        temporary.write_bytes(content)
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write ``files`` into ``folder``; each takes its predecessor's place in one step, in the order of ``files``.

    Writers of one folder on one machine take turns. Where the first file cannot be written, a folder that was made for
    it is removed again.

    Raises:
        ValueError: ``folder`` is a file.
        OSError: the folder cannot be made or written.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder: expected a folder, or a path that does not exist, got the file {folder}.")
    folder = Path(os.path.realpath(folder))
    created = _make_folders(folder)
    try:
        with _writers_turn(folder):
            for name, content in files.items():
                write_file(folder / name, content)
    except BaseException:
        for path in created:
            with contextlib.suppress(OSError):
                path.rmdir()  # refuses where a file is in it
        raise


@contextlib.contextmanager
def folder_lock(folder: Path, purpose: str) -> Iterator[None]:
    """Work in ``folder`` alone; the system gives the lock back when the process ends, however it ends.

    Args:
        folder: is made if need be, and gets a file ``.lock``.
        purpose: what is done there, for the message: "train".

    Raises:
        FolderInUseError: another process has the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise FolderInUseError(
            f"{folder}: another process works in this folder. Wait for its end, or {purpose} in another folder."
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _writers_turn(folder: Path) -> Iterator[None]:
    """One writer of ``folder`` at a time on this machine; the lock file lies outside, since the folder is published."""
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "user")
    locks = Path(tempfile.gettempdir()) / f"eloftr-ops-locks-{user}"
    locks.mkdir(mode=0o700, exist_ok=True)
    name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]
    with filelock.FileLock(locks / f"{name}.lock", timeout=_LOCK_TIMEOUT):
        yield


def _make_folders(folder: Path) -> list[Path]:
    """Make ``folder`` and its parents; those that were made, deepest first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _is_stale(path: Path, host: str, process: int) -> bool:
    if host != _HOST or os.name == "nt":  # where os.kill always kills
        with contextlib.suppress(OSError):
            return time.time() - path.stat().st_mtime > _STALE_AFTER
        return False
    try:
        os.kill(process, 0)  # asks whether it lives, and does nothing to it
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
