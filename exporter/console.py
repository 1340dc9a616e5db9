"""What is said on stderr while a run goes on: notes, and progress bars on a terminal."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import click

from exporter.errors import OutputError
from exporter.shards import Progress


def say(text: str, *, err: bool = False) -> None:
    """Print one line. A reader that has gone away does not end a run, nor does a log that is full.

    Raises:
        OutputError: stdout takes no more, so that the result would be lost.
    """
    try:
        click.echo(text, err=err)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), (sys.stderr if err else sys.stdout).fileno())
        if not err and not isinstance(error, BrokenPipeError):
            raise OutputError(
                f"The result cannot be printed: {error.strerror}.", "Send stdout elsewhere; see --report too."
            ) from error


class Abandoned(Exception):
    """Ends the work of a thread that nobody waits for any more."""


@dataclass(frozen=True)
class Console:
    """Notes and progress; neither is the result, so neither goes to stdout."""

    quiet: bool = False

    def note(self, text: str) -> None:
        """One line that the user should know but need not act on."""
        if not self.quiet:
            say(text, err=True)

    def warn(self, text: str) -> None:
        """One line that the user should act on; --quiet does not hide it."""
        say(f"Warning: {text}", err=True)

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[Progress]:
        """A bar of ``total`` bytes on a terminal; nothing in a pipe.

        Threads that are still at work when the block is left, because one of them failed or the run was interrupted,
        end at their next step: Abandoned is raised in them.
        """
        from tqdm import tqdm

        silent = self.quiet or sys.stderr is None or not sys.stderr.isatty()
        left = threading.Event()
        with tqdm(total=total, desc=label, unit="B", unit_scale=True, disable=silent, leave=False) as bar:

            def advance(count: int) -> None:
                if left.is_set():
                    raise Abandoned
                bar.update(count)

            try:
                yield advance
            finally:
                left.set()
