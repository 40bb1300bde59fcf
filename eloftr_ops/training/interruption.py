# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and SIGTERM during a run: the step that is being taken is finished, then the run saves and stops."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_NOTICE = "\nInterrupted: the run stops and saves after this step. Once more stops at once, without saving.\n"


class Interruption:
    """A context in which the first signal is noted and a second one raises ``KeyboardInterrupt``.

    Handlers can be set in the main thread only; elsewhere, and for signals that are ignored (``nohup``), nothing
    changes.
    """

    def __init__(self) -> None:
        self.signal: int | None = None  # that was received
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        with contextlib.suppress(OSError):
            os.write(2, _NOTICE.encode())  # print is not safe in a handler


def leave_signals_to_the_main_process(worker: int) -> None:
    """For processes that prepare data: a terminal sends Ctrl-C to all, and without its workers the run cannot save."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
