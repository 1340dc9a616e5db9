"""The files that an export is made from: how the manifest names them, and whether they stayed as they were."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.checkpoints import Checkpoint
from exporter.errors import CheckpointError
from exporter.tensors import LazyTensor

_FINGERPRINT_BYTES = 64 * 1024


@dataclass(frozen=True)
class InputFile:
    """A file as it was when it was looked at: its name in the checkpoint folder, size in bytes, fingerprint, mtime.

    The fingerprint is a sha256 of the file's first and last 64 KiB: a safetensors header lies at the start, the
    directory of a torch archive, with the checksums of all its members, at the end.
    """

    name: str
    size: int
    fingerprint: str
    modified_ns: int

    def describe(self) -> dict[str, Any]:
        """What the manifest says of it: nothing that a copy of the same checkpoint would not say."""
        return {"path": self.name, "size": self.size, "fingerprint": self.fingerprint}


@dataclass(frozen=True)
class Inputs:
    """Every file that an export's tensors are read from, by its path."""

    files: dict[Path, InputFile]

    @property
    def paths(self) -> dict[str, Path]:
        """Where the files are, by name."""
        return {file.name: path for path, file in self.files.items()}

    @classmethod
    def of(cls, tensors: Iterable[LazyTensor], checkpoint: Checkpoint) -> Inputs:
        """The files of ``tensors``, which are the checkpoint's, as they are now, sorted by name.

        Their names are those in its folder; ``base/`` stands before those of an adapter's base model. A file of
        weights that lies elsewhere goes by its own name.
        """
        paths = frozenset().union(*{tensor.paths for tensor in tensors})
        found = {path: _look(path, _name(path, checkpoint)) for path in paths}
        return cls(dict(sorted(found.items(), key=lambda item: item[1].name)))

    def require_unchanged(self) -> None:
        """The files are still what they were: nobody wrote to the checkpoint while it was exported.

        Raises:
            CheckpointError: one of them changed or went away.
        """
        for path, before in self.files.items():
            try:
                status = path.stat()
                same = (status.st_size, status.st_mtime_ns) == (before.size, before.modified_ns)
            except OSError:
                same = False
            if not same:
                raise CheckpointError(
                    f"{before.name} was written to while it was exported.",
                    "Export again when nothing writes to the checkpoint any more.",
                )


def _name(path: Path, checkpoint: Checkpoint) -> str:
    if checkpoint.base is not None and path.is_relative_to(checkpoint.base.folder):
        return f"base/{path.relative_to(checkpoint.base.folder).as_posix()}"
    inside = path.is_relative_to(checkpoint.folder)
    return path.relative_to(checkpoint.folder).as_posix() if inside else path.name


def _look(path: Path, name: str) -> InputFile:
    try:
        status = path.stat()
        with path.open("rb") as file:
            start = file.read(_FINGERPRINT_BYTES)
            file.seek(max(status.st_size - _FINGERPRINT_BYTES, len(start)))
            fingerprint = hashlib.sha256(start + file.read()).hexdigest()
    except OSError as error:
        raise CheckpointError(
            f"{name} cannot be read any more: {error.strerror}.", "Export a checkpoint that nothing removes."
        ) from error
    return InputFile(name, status.st_size, fingerprint, status.st_mtime_ns)
