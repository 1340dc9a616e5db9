"""Opening a checkpoint: one module per format, and :func:`open_checkpoint` that tells them apart.

Opening reads metadata only: pickles and headers, no tensor data. To add a format, write a module with ``is_<format>``
and ``open_<format>`` and name both in ``_FORMATS``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from exporter.checkpoints.adapter import is_adapter, open_adapter
from exporter.checkpoints.checkpoint import Checkpoint, WeightsChoice
from exporter.checkpoints.distributed import is_distributed, open_distributed
from exporter.checkpoints.experts import is_expert_parallel, open_expert_parallel
from exporter.checkpoints.folder import require_inside
from exporter.checkpoints.lightning import is_lightning, open_lightning
from exporter.checkpoints.pipeline import is_pipeline, open_pipeline
from exporter.checkpoints.pretrained import is_pretrained, open_pretrained
from exporter.checkpoints.tensor_parallel import is_tensor_parallel, open_tensor_parallel
from exporter.checkpoints.universal import is_universal, open_universal, universal_tags
from exporter.checkpoints.zero import is_tag, is_zero, open_zero
from exporter.errors import CheckpointError, IncompleteCheckpointError, UsageError

__all__ = ["Checkpoint", "WeightsChoice", "open_checkpoint"]

_FORMATS: tuple[tuple[Callable[[Path], bool], Callable[[Path, str | None], Checkpoint]], ...] = (
    (is_adapter, open_adapter),
    (is_expert_parallel, open_expert_parallel),
    (is_pipeline, open_pipeline),
    (is_tensor_parallel, open_tensor_parallel),
    (is_zero, open_zero),
    (is_universal, open_universal),
    (is_distributed, open_distributed),
    (is_pretrained, open_pretrained),
    (is_lightning, open_lightning),
)


def open_checkpoint(path: Path, tag: str | None = None) -> Checkpoint:
    """The checkpoint at ``path``, or the newest complete ``checkpoint-N`` of the run at ``path``.

    Raises:
        UsageError: there is no such folder, or no such tag.
        CheckpointError: nothing there can be read whole and safely.
        RefusedError: what is there cannot be exported.
    """
    if not path.is_dir():
        raise UsageError(f"There is no checkpoint folder {path.name!r}.", "Name the folder that the training wrote.")
    try:
        runs = _run_checkpoints(path)
        return _open_newest(runs, tag) if runs else _open_folder(path, tag)
    except OSError as error:
        raise CheckpointError(
            f"{Path(error.filename or path).name} cannot be read: {error.strerror}.",
            "Make the checkpoint folder and all its files readable.",
        ) from error


def _run_checkpoints(path: Path) -> list[Path]:
    """The ``checkpoint-N`` or ``step-N`` folders of a run, oldest first; a DeepSpeed tag of that name is none."""
    runs = [
        entry
        for entry in path.iterdir()
        if re.fullmatch(r"(checkpoint|step)-\d{1,18}", entry.name) and entry.is_dir() and not is_tag(entry)
    ]
    return sorted(runs, key=lambda entry: int(entry.name.partition("-")[2]))


def _open_newest(runs: list[Path], tag: str | None) -> Checkpoint:
    notes: list[str] = []
    runs = [folder for folder in runs if tag is not None and (folder / tag).is_dir()] or runs
    for folder in reversed(runs):
        require_inside(folder)
        try:
            checkpoint = _open_folder(folder, tag)
        except IncompleteCheckpointError as error:
            if folder is runs[0]:
                raise
            notes.append(f"{folder.name} is incomplete and is not exported: {error.message}")
        else:
            notes.append(f"{folder.name} is the newest complete checkpoint of this run.")
            return replace(checkpoint, notes=(*notes, *checkpoint.notes))
    raise AssertionError("a run has at least one checkpoint")


def _open_folder(folder: Path, tag: str | None) -> Checkpoint:
    if tag in universal_tags(folder):
        return open_universal(folder, tag)
    for is_format, open_format in _FORMATS:
        if is_format(folder):
            return open_format(folder, tag)
    if is_tag(folder):
        raise CheckpointError(
            f"{folder.name} is a tag of a DeepSpeed checkpoint, not the checkpoint: config.json lies above it.",
            f"Name the folder that holds {folder.name}, with --tag {folder.name}.",
        )
    raise IncompleteCheckpointError(
        f"{folder.name} is no checkpoint: it has no DeepSpeed tag, no safetensors and no pytorch_model.bin file.",
        "Name the folder that the training wrote (with latest, model.safetensors, or checkpoint-N folders).",
    )
