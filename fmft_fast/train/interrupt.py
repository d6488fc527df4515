"""Ctrl-C and SIGTERM as requests, so that a run ends between two steps and can save itself."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM into a request that the loop reads between two steps.

    Interrupting inside a step would leave half-updated weights; a second Ctrl-C does so anyway.
    Threads other than the main one cannot receive signals and are not asked.
    """
    requested: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def request(number: int, frame: Any) -> None:
        if requested:
            signal.signal(number, before[number])
            os.kill(os.getpid(), number)
        requested.append(number)

    watched = (signal.SIGINT, signal.SIGTERM)
    before: dict[int, Any] = {number: signal.getsignal(number) for number in watched}
    for number in before:
        signal.signal(number, request)
    try:
        yield lambda: bool(requested)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
