"""What all commands share at the terminal: errors in one line, progress, and interrupts that let things end well."""

from __future__ import annotations

import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from ray_moe import errors

USER_ERRORS = (
    errors.InvalidRequest,
    errors.NotFound,
    errors.InvalidConfig,
    errors.Unauthenticated,
    errors.PermissionDenied,
    errors.InvalidCheckpoint,
    errors.UnsupportedModel,
    errors.InsufficientResources,
)
"""What whoever typed the command can change; exit code 2. Everything else ends with 1."""

Debug = Annotated[bool, typer.Option("--debug", help="Show where an error came from.")]
"""The option that every command has."""

LINE_EVERY_S = 10.0
"""Where there is no terminal, progress is a line this often."""


@contextmanager
def told(debug: bool) -> Iterator[None]:
    """Around a command: an error of ours becomes one line on stderr and an exit code, Ctrl-C becomes 130."""
    try:
        yield
    except errors.RayMoEError as error:
        if debug:
            traceback.print_exc()
        Console(stderr=True).print(Text.assemble(("error: ", "bold red"), error.message), soft_wrap=True)
        raise typer.Exit(2 if isinstance(error, USER_ERRORS) else 1) from error
    except KeyboardInterrupt as error:
        raise typer.Exit(130) from error


class Interrupts:
    """Turns the first SIGINT or SIGTERM into KeyboardInterrupt, and passes over further ones: ending takes a moment."""

    def __init__(self) -> None:
        self._seen = False
        self._ending = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Interrupts:
        self.install()
        return self

    def install(self) -> None:
        """Listen; call it again after `ray.init`, which puts handlers of its own in place."""
        for number in (signal.SIGINT, signal.SIGTERM):
            previous = signal.signal(number, self._handle)
            self._previous.setdefault(number, previous)

    def ignore(self) -> None:
        """From now on pass over all of them, also after the block: the process is about to end by itself."""
        self._ending = True
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # unlike a handler of ours, it holds while Python is torn down

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._seen:
            self._seen = True
            raise KeyboardInterrupt

    def __exit__(self, *_: object) -> None:
        if not self._ending:
            for number, previous in self._previous.items():
                signal.signal(number, previous)  # type: ignore[arg-type]


class ProgressView:
    """A progress bar at a terminal; a line now and then elsewhere. Use it as a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None)
        self._stage = ""
        self._last_line_s = -LINE_EVERY_S

    def update(self, stage: str, done: float, total: float, detail: str = "") -> None:
        """Show that `done` of `total` is reached in `stage`; a total of 0 is not known."""
        text = f"{stage}: {detail}" if detail else stage
        self._bar.update(self._task, description=text, completed=done, total=total or None)
        if self._console.is_terminal:
            return
        now_s = time.monotonic()
        if stage != self._stage or now_s - self._last_line_s >= LINE_EVERY_S:
            share = f" ({100 * done / total:.0f}%)" if total else ""
            self._console.print(Text(f"  {text}{share}"), soft_wrap=True)
            self._stage, self._last_line_s = stage, now_s
            sys.stdout.flush()

    def __enter__(self) -> ProgressView:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def format_bytes(num_bytes: float) -> str:
    """`12.3 MB`, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"
