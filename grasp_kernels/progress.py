"""What a long command says of its progress: a bar on a terminal, now and then a line in a log."""

import sys
from functools import cache
from typing import Any

from grasp_kernels import processes

_SECONDS = 30.0  # between two lines of a log
_LINE = "{desc}: {n_fmt}/{total_fmt} {unit}s, {elapsed} so far, about {remaining} left{postfix}"


def bar(*args: Any, **options: Any) -> Any:
    """Make a bar of tqdm in the first process; in a log it writes a line every half minute."""
    from tqdm.auto import tqdm

    if processes.index() > 0:
        options["disable"] = True
    if sys.stderr.isatty() or tqdm.__module__.endswith("notebook"):
        return tqdm(*args, **options)
    settings = {"mininterval": _SECONDS, "maxinterval": _SECONDS, "delay": _SECONDS}
    return _lines()(*args, **settings, bar_format=_LINE, miniters=1, **options)


@cache
def _lines() -> Any:
    from tqdm.std import tqdm

    class Lines(tqdm):  # type: ignore[type-arg]
        """Write whole lines instead of one line again and again."""

        disable: bool

        def display(self, msg: str | None = None, pos: int | None = None) -> None:
            self.fp.write(f"{self}\n")
            self.fp.flush()

        def close(self) -> None:
            if not self.disable:
                self.disable = True
                self._decr_instances(self)
                spoke = self.last_print_t >= self.start_t + self.delay
                if spoke and self.n > self.last_print_n:
                    self.display()

    return Lines


def tell(sentence: str) -> None:
    """Write a sentence beside the bars, in the first process."""
    if processes.index() == 0 and sys.stderr.isatty():
        from tqdm.auto import tqdm

        tqdm.write(sentence, file=sys.stderr)
    elif processes.index() == 0:
        print(sentence, file=sys.stderr, flush=True)
