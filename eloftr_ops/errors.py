# SPDX-License-Identifier: Apache-2.0
"""The mistakes of users that the command line tells from defects."""

from __future__ import annotations

__all__ = ["ArgumentError", "FileError"]


class FileError(ValueError):
    """A file that cannot be read or written; the message names it and says what to do."""


class ArgumentError(ValueError):
    """An argument that cannot be used; the message is ``argument: what was expected, and what to do``."""

    def __init__(self, argument: str, reason: str) -> None:
        super().__init__(f"{argument}: {reason}")
        self.argument = argument
        self.reason = reason
