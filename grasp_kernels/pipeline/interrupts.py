"""Ctrl-C that is not lost.

Python drops an exception that is raised inside of `__del__`, such as that of a progress bar, and
with it the KeyboardInterrupt of a Ctrl-C that comes at that moment.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_asked = threading.Event()


@contextmanager
def remembered_interrupts() -> Iterator[None]:
    """Let `raise_if_interrupted` know of every Ctrl-C in this block.

    Where somebody else handles it, or in another thread than the first, nothing changes.
    """
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def remember(number: int, frame: FrameType | None) -> None:
        _asked.set()
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _asked.clear()


def raise_if_interrupted() -> None:
    """Raise a KeyboardInterrupt that was dropped."""
    if _asked.is_set():
        raise KeyboardInterrupt
