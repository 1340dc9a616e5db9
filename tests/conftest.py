"""What the tests share: the checkpoints that real trainers wrote, and an export of one in a folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from exporter.console import Console
from exporter.export import run_export
from exporter.options import Options
from exporter.rehearsal import RehearsalHub
from exporter.report import Report

CHECKPOINTS = Path(__file__).parent / "checkpoints"


@dataclass(frozen=True)
class Case:
    """A checkpoint as a user has it, and what is true of it."""

    name: str

    @property
    def checkpoint(self) -> Path:
        return CHECKPOINTS / self.name / "checkpoint"

    @property
    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads((CHECKPOINTS / self.name / "case.json").read_text())
        return facts

    @property
    def truth(self) -> dict[str, Any]:
        """The live model's weights by their names in memory."""
        from safetensors.torch import load_file

        return load_file(CHECKPOINTS / self.name / "truth.safetensors")

    def copy(self, place: Path) -> Path:
        """A copy of the checkpoint that a test may damage."""
        return Path(shutil.copytree(self.checkpoint, place / "checkpoint"))


CASES = [Case(path.parent.name) for path in sorted(CHECKPOINTS.glob("*/case.json"))]
ALL_CASES = [case for case in CASES if not case.facts["case"].get("without_frozen")]
"""The cases that can be exported: of the others a part was left out of the save."""
ZERO_CASES = [case for case in ALL_CASES if case.facts["format"] == "zero"]


@pytest.fixture
def export(tmp_path: Path) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """Exports a checkpoint into a new folder with the options given; returns the folder and the report."""

    def run(checkpoint: Path, **options: Any) -> tuple[Path, dict[str, Any]]:
        output = options.pop("output_folder", tmp_path / f"export-{len(list(tmp_path.iterdir()))}")
        report = Report()
        run_export(Options(checkpoint, output_folder=output, **options), report, Console(quiet=True))
        return output, report.as_dict()

    return run


@pytest.fixture(params=["xet", "lfs"])
def hub(request: pytest.FixtureRequest) -> Iterator[RehearsalHub]:
    with RehearsalHub(xet=request.param == "xet", organizations=["org"]) as running:
        yield running


@pytest.fixture
def lfs_hub() -> Iterator[RehearsalHub]:
    with RehearsalHub(xet=False, organizations=["org"]) as running:
        yield running
