"""Where an export grows before it is seen: a hidden folder beside its place, moved there by one rename."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from exporter.errors import OutputError, UsageError
from exporter.manifest import MANIFEST_NAME

_HINT = "Name another --output_folder, or empty this one."


def check_output_folder(output: Path, checkpoint: Path, overwrite: bool) -> None:
    """Whether an export may be placed at ``output``.

    Raises:
        UsageError: it lies inside the checkpoint, or the checkpoint inside it.
        OutputError: something is there that is not an earlier export, or may not be replaced.
    """
    place, source = output.resolve(), checkpoint.resolve()
    if place.is_relative_to(source) or source.is_relative_to(place):
        raise UsageError("--output_folder and the checkpoint lie inside one another.", "Name a folder elsewhere.")
    if not output.exists() and not output.is_symlink():
        return
    if not output.is_dir() or output.is_symlink():
        raise OutputError(f"{output.name} is there and is not a folder.", _HINT)
    if not any(output.iterdir()):
        return
    if not (output / MANIFEST_NAME).is_file():
        raise OutputError(f"{output.name} is not empty and holds no earlier export.", _HINT)
    if not overwrite:
        raise OutputError(f"{output.name} holds an earlier export.", "Add --overwrite to replace it.")


@contextmanager
def staging_folder(output: Path | None, needed: int) -> Iterator[Path]:
    """A private folder on the file system of ``output``, or of temporary files; removed at the end unless placed.

    ``needed`` is the number of bytes that will be written there.

    Raises:
        OutputError: it cannot be made, or the disk has too little room.
    """
    try:
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{output.name}." if output is not None else "export-"
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=output.parent if output is not None else None))
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise OutputError(f"No staging folder can be made: {error.strerror}.", _HINT) from error
    try:
        if free < needed:
            raise OutputError(
                f"The export needs {needed:,} bytes, and the disk has {free:,} free.",
                "Make room, or name an --output_folder on another disk (TMPDIR without one).",
            )
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def place(folder: Path, output: Path) -> None:
    """Move the finished ``folder`` to ``output`` in one rename; an earlier export goes away after it.

    Raises:
        OutputError: the file system does not permit it.
    """
    try:
        umask = os.umask(0)
        os.umask(umask)
        folder.chmod(0o777 & ~umask)
        _sync_folder(folder)
        earlier = folder.with_name(folder.name + ".earlier")
        if output.exists() and any(output.iterdir()):
            os.rename(output, earlier)
        os.rename(folder, output)
        _sync_folder(output.parent)
        shutil.rmtree(earlier, ignore_errors=True)
    except OSError as error:
        raise OutputError(f"The export cannot be moved to {output.name}: {error.strerror}.", _HINT) from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
