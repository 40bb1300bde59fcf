# SPDX-License-Identifier: Apache-2.0
"""Files of a Hugging Face Hub repository, through the Hub's own cache."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from eloftr_ops.weights.files import WeightsNotFoundError

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
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

        try:
            path = huggingface_hub.hf_hub_download(
                self.name,
                file,
                revision=self.revision,
                cache_dir=None if self.cache_dir is None else Path(self.cache_dir),
                local_files_only=self.local_files_only,
            )
        except (OSError, ValueError) as error:
            raise WeightsNotFoundError(self._advice(file, error)) from error
        return Path(path)

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
