"""What is said on stderr while a run goes on: notes, and progress bars on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import click

from exporter.shards import Progress


@dataclass(frozen=True)
class Console:
    """Notes and progress; neither is the result, so neither goes to stdout."""

    quiet: bool = False

    def note(self, text: str) -> None:
        """One line that the user should know but need not act on."""
        if not self.quiet:
            click.echo(text, err=True)

    def warn(self, text: str) -> None:
        """One line that the user should act on; --quiet does not hide it."""
        click.echo(f"Warning: {text}", err=True)

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[Progress]:
        """A bar of ``total`` bytes on a terminal; nothing in a pipe."""
        from tqdm import tqdm

        silent = self.quiet or not sys.stderr.isatty()
        with tqdm(total=total, desc=label, unit="B", unit_scale=True, disable=silent, leave=False) as bar:

            def advance(count: int) -> None:
                bar.update(count)

            yield advance
