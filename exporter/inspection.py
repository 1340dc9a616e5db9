"""What a checkpoint folder holds, from its metadata alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from exporter.checkpoints import Checkpoint
from exporter.console import Console
from exporter.hub import HubAccess
from exporter.report import Report
from exporter.source import open_source


def run_inspect(path: Path, tag: str | None, access: HubAccess, report: Report, console: Console) -> None:
    """Fill the report's ``checkpoint`` with what ``path`` holds.

    Raises:
        ExportError: as :func:`exporter.source.open_source` raises it; it names what is missing.
    """
    checkpoint = open_source(path, tag, access, console)
    for note in checkpoint.notes:
        console.note(note)
    report.checkpoint = describe(checkpoint, "model" if checkpoint.master is None else "master")
    report.checkpoint["available"] = [name for name in ("master", "model") if getattr(checkpoint, name) is not None]
    report.status = "inspected"


def describe(checkpoint: Checkpoint, weights: str) -> dict[str, Any]:
    """The report's ``checkpoint`` object, of the set of weights that is named."""
    tensors = checkpoint.weights("master" if weights == "master" else "model")
    dtypes: dict[str, int] = {}
    for tensor in tensors.values():
        dtypes[tensor.dtype.name] = dtypes.get(tensor.dtype.name, 0) + 1
    return {
        "format": checkpoint.format,
        "zero_stage": checkpoint.zero_stage,
        "world_size": checkpoint.world_size,
        "tag": checkpoint.tag,
        "step": checkpoint.step,
        "repo_id": checkpoint.repo_id,
        "revision": checkpoint.revision,
        "base_model": checkpoint.base.hub_name if checkpoint.base else None,
        "weights": weights,
        "tensors": len(tensors),
        "parameters": sum(tensor.numel for tensor in tensors.values()),
        "dtypes": dict(sorted(dtypes.items())),
        "tied": dict(checkpoint.aliases),
    }
