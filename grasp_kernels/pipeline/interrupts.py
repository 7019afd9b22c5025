"""Keep a Ctrl-C from being lost.

Python drops an exception that is raised inside `__del__`, such as the `__del__` of a progress bar.
A KeyboardInterrupt that comes at that moment is dropped too.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_asked = threading.Event()


@contextmanager
def remembered_interrupts() -> Iterator[None]:
    """Let `raise_if_interrupted` know of every Ctrl-C in this block.

    Nothing changes outside the main thread, or where Ctrl-C has another handler already.
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
