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
    place, source = _real(output), _real(checkpoint)
    if place.is_relative_to(source) or source.is_relative_to(place):
        raise UsageError("--output_folder and the checkpoint lie inside one another.", "Name a folder elsewhere.")
    try:
        if not output.exists() and not output.is_symlink():
            return
        if not output.is_dir() or output.is_symlink():
            raise OutputError(f"{place.name} is there and is not a folder.", _HINT)
        if place.is_mount():
            raise OutputError(f"{place.name} is a mount point, which cannot be replaced.", "Name a folder inside it.")
        is_there = _holds_export(output)
    except OSError as error:
        raise OutputError(f"{place.name} cannot be used: {error.strerror}.", _HINT) from error
    if is_there and not overwrite:
        raise OutputError(f"{place.name} holds an earlier export.", "Add --overwrite to replace it.")


def _real(path: Path) -> Path:
    """Absolute, without symlinks and dots; of a loop of symlinks what can be said."""
    return Path(os.path.realpath(path))


def _holds_export(output: Path) -> bool:
    """Whether an earlier export is there; False if the folder is empty.

    Raises:
        OutputError: something else is there.
    """
    if not any(output.iterdir()):
        return False
    if not (output / MANIFEST_NAME).is_file():
        raise OutputError(f"{_real(output).name} is not empty and holds no earlier export.", _HINT)
    return True


@contextmanager
def staging_folder(output: Path | None, needed: int) -> Iterator[Path]:
    """A private folder on the file system of ``output``, or of temporary files; removed at the end unless placed.

    ``needed`` is the number of bytes that will be written there. Parents of ``output`` that had to be made go away
    again where nothing is placed in them.

    Raises:
        OutputError: it cannot be made, or the disk has too little room.
    """
    parent = _real(output).parent if output is not None else Path(tempfile.gettempdir())
    prefix = f".{_real(output).name}." if output is not None else "export-"
    with _parents(parent):
        try:
            free = shutil.disk_usage(parent).free
            folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        except OSError as error:
            raise _no_staging(error) from error
        try:
            if free < needed:
                raise OutputError(
                    f"The export needs {needed:,} bytes, and the disk has {free:,} free.",
                    "Make room, or name an --output_folder on another disk (TMPDIR without one).",
                )
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _parents(folder: Path) -> Iterator[None]:
    """``folder`` and those above it, made where they are missing; at the end the empty ones of these go away again."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _no_staging(error) from error
    try:
        yield
    finally:
        for path in missing:
            if not any(path.iterdir()):
                path.rmdir()


def _no_staging(error: OSError) -> OutputError:
    return OutputError(f"No staging folder can be made: {error.strerror}.", _HINT)


def place(folder: Path, output: Path) -> None:
    """Move the finished ``folder`` to ``output`` in one rename; an earlier export goes away after it.

    Raises:
        OutputError: something else has come there, or the file system does not permit it; then all is as it was.
    """
    output = _real(output)
    earlier = folder.with_name(folder.name + ".earlier")
    try:
        umask = os.umask(0)
        os.umask(umask)
        folder.chmod(0o777 & ~umask)
        _sync_folder(folder)
        if output.exists() and _holds_export(output):
            os.rename(output, earlier)
        try:
            os.rename(folder, output)
        except BaseException:
            if earlier.exists() and not output.exists():
                os.rename(earlier, output)
            raise
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
