# SPDX-License-Identifier: Apache-2.0
"""Wall-clock time that a run may take."""

from __future__ import annotations

import re
from collections.abc import Callable

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_RESERVE = 5.0  # seconds kept for what could not be measured yet


def parse_duration(text: str) -> float:
    """Seconds of ``90``, ``90s``, ``25m``, ``1.5h``, ``1h30m`` or ``2d``.

    Raises:
        ValueError: another text, or no time at all.
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip())
    if not parts or "".join(n + unit for n, unit in parts) != text.strip():
        raise ValueError(f"budget: expected a time such as 90s, 25m or 1h30m, got {text!r}.")
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if seconds <= 0:
        raise ValueError(f"budget: expected a time above zero, got {text!r}.")
    return seconds


class Budget:
    """A wall-clock budget that reserves time for the last checkpoint.

    Args:
        seconds: from now on; None for no end.
        clock: seconds since any moment.
    """

    def __init__(self, seconds: float | None, clock: Callable[[], float]) -> None:
        self._seconds, self._clock, self._start = seconds, clock, clock()
        self._longest: dict[str, float] = {}
        self.noted = 0.0  # seconds from the start until something was last said to have ended

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._start

    def took(self, what: str, since: float) -> None:
        """Note that a repeated action took from ``since`` (a value of ``elapsed``) until now."""
        self.noted = self.elapsed
        self._longest[what] = max(self._longest.get(what, 0.0), self.noted - since)

    def is_over(self, *upcoming: str) -> bool:
        """Whether the next actions may not fit any more; each counts with 1.5 times its longest duration."""
        if self._seconds is None:
            return False
        needed = _RESERVE + 1.5 * sum(self._longest.get(what, 0.0) for what in upcoming)
        return self.elapsed + needed > self._seconds
