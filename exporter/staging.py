"""Where an export grows before it is seen: a hidden folder beside its place, moved there by one rename.

For a place ``DIR/NAME`` these stand beside it while a run goes on, and after one that was interrupted:

    DIR/.NAME.lock                held by the process that exports there; the lock dies with it
    DIR/.NAME.partial/key         what is exported: a digest of the checkpoint's files and of the options
    DIR/.NAME.partial/export/     the folder that becomes the export
    DIR/.NAME.partial/finished/   a record of each shard that is written and proven
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from exporter.errors import CredentialError, HubRefusedError, HubUnreachableError, OutputError, UsageError
from exporter.journal import Journal
from exporter.manifest import MANIFEST_NAME

_HINT = "Name another --output_folder, or empty this one."
_RESUMABLE = (KeyboardInterrupt, CredentialError, HubRefusedError, HubUnreachableError)
"""How a run ends that another run can finish: it was stopped, or the export is right and the Hub did not take it."""

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NOT_SUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


@dataclass(frozen=True)
class Staging:
    """The folder that an export is written into, and the journal of its finished shards."""

    folder: Path
    journal: Journal


def check_output_folder(output: Path, checkpoint: Path, overwrite: bool) -> None:
    """Whether an export may be placed at ``output``.

    Raises:
        UsageError: it lies inside the checkpoint, or the checkpoint inside it.
        OutputError: something is there that is not an earlier export, or may not be replaced.
    """
    place, source = real_path(output), real_path(checkpoint)
    if place.is_relative_to(source) or source.is_relative_to(place):
        raise UsageError("--output_folder and the checkpoint lie inside one another.", "Name a folder elsewhere.")
    _require_replaceable(output, overwrite)


def _require_replaceable(output: Path, overwrite: bool) -> None:
    place = real_path(output)
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


def real_path(path: Path) -> Path:
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
        raise OutputError(f"{real_path(output).name} is not empty and holds no earlier export.", _HINT)
    return True


def private_place(name: str) -> Path:
    """A place for an export that nobody keeps: ``name`` in this user's own folder of temporary files.

    Raises:
        OutputError: that folder is another user's, who made it first.
    """
    folder = Path(tempfile.gettempdir()) / f"export-model-{os.getuid()}"
    _require_own(folder, "Remove it, or set TMPDIR to a folder of your own.")
    return folder / name


@contextmanager
def staging_folder(place: Path, key: str, needed: int, sources: Mapping[str, Path]) -> Iterator[Staging]:
    """The staging of the export that goes to ``place``, with what an interrupted run with the same ``key`` left.

    ``needed`` is the number of bytes that the whole export takes there, ``sources`` are the files that it is made from,
    by name. At the end the staging goes away, unless the run ended in a way that another one can finish. Parents that
    had to be made go away where they stay empty.

    Raises:
        OutputError: another process exports to the same place, the staging cannot be made, or the disk has too little
            room.
    """
    place = real_path(place)
    partial = place.with_name(f".{place.name}.partial")
    with _parents(place.parent), _locked(place):
        try:
            staging = _open(place, partial, key, sources)
        except OSError as error:
            raise _no_staging(error) from error
        is_resumable = False
        try:
            _require_room(place.parent, needed - staging.journal.finished_bytes)
            yield staging
        except _RESUMABLE:
            is_resumable = staging.journal.finished_bytes > 0
            raise
        finally:
            if not is_resumable:
                shutil.rmtree(partial, ignore_errors=True)


def _open(place: Path, partial: Path, key: str, sources: Mapping[str, Path]) -> Staging:
    """The staging at ``partial``; of an earlier one what is finished stays if it has the same ``key``."""
    _require_own(partial, "Remove it, or name another --output_folder.")
    earlier = partial / "earlier"
    if earlier.exists() and not place.exists():
        os.rename(earlier, place)  # a run ended between the two renames with which it was replaced
    staging = Staging(partial / "export", Journal(partial / "finished", partial / "export", sources))
    if not (_read(partial / "key") == key.encode() and staging.folder.is_dir() and staging.journal.records.is_dir()):
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(0o700)
        staging.folder.mkdir()
        staging.journal.records.mkdir()
        (partial / "key").write_text(key)
    staging.journal.remove_unfinished()
    return staging


def _require_own(folder: Path, hint: str) -> None:
    """Nobody else prepared ``folder``: its records would be believed.

    The owner is compared with that of a new file beside it, since some file systems give every file the same owner.

    Raises:
        OutputError: it is a link, no folder, or another user's.
    """
    try:
        status = folder.lstat()
        with tempfile.TemporaryFile(prefix=".", dir=folder.parent) as file:
            owner = os.fstat(file.fileno()).st_uid
    except FileNotFoundError:
        return
    except OSError as error:
        raise _no_staging(error) from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != owner:
        raise OutputError(f"{folder.name} is there, and is no folder that you made.", hint)


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


@contextmanager
def _locked(place: Path) -> Iterator[None]:
    """Alone at ``place``, until the ``with`` block ends or the process dies."""
    path = place.with_name(f".{place.name}.lock")
    descriptor = _take_lock(path, place.name)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _take_lock(path: Path, name: str) -> int:
    try:
        while True:
            with ExitStack() as stack:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
                stack.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                    stack.pop_all()
                    return descriptor
                # Its holder finished, and removed it, while we opened it.
    except BlockingIOError as error:
        raise OutputError(
            f"Another process exports to {name} at this moment.", "Wait for it, or name another --output_folder."
        ) from error
    except OSError as error:
        raise _no_staging(error) from error


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
            with suppress(OSError):  # another process may have put something there, or taken it away, a moment ago
                path.rmdir()


def _require_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"The export needs {needed:,} bytes, and the disk has {free:,} free.",
            "Make room, or name an --output_folder on another disk (TMPDIR without one).",
        )


def _no_staging(error: OSError) -> OutputError:
    return OutputError(f"No staging folder can be made: {error.strerror}.", _HINT)


def place_export(staging: Staging, output: Path, overwrite: bool) -> None:
    """Move the finished export to ``output`` in one rename; an earlier export is there until then.

    Raises:
        OutputError: something else has come there, or the file system does not permit it; then all is as it was.
    """
    output = real_path(output)
    _require_replaceable(output, overwrite)
    try:
        umask = os.umask(0)
        os.umask(umask)
        staging.folder.chmod(0o777 & ~umask)
        sync_folder(staging.folder)
        if output.exists() and any(output.iterdir()):
            _replace(staging.folder, output)
        else:
            os.rename(staging.folder, output)
        sync_folder(output.parent)
    except OSError as error:
        raise OutputError(f"The export cannot be moved to {output.name}: {error.strerror}.", _HINT) from error


def _replace(folder: Path, output: Path) -> None:
    """Put ``folder`` in the place of ``output``, which goes into the staging: by one exchange where there is one."""
    if _exchange(folder, output):
        return
    earlier = folder.with_name("earlier")
    os.rename(output, earlier)
    with ExitStack() as undo:
        undo.callback(os.rename, earlier, output)
        os.rename(folder, output)
        undo.pop_all()


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two folders in one step; False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NOT_SUPPORTED:
        return False
    raise OSError(code, os.strerror(code))


def sync_folder(folder: Path) -> None:
    """Flush the names in ``folder`` to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
