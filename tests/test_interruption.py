"""A run that is killed anywhere leaves nothing half-made, and the next one finishes it with the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Case

DRIVER = Path(__file__).parent / "killed_export.py"
CHECKPOINT = str(Case("llama-zero2").checkpoint)
OPTIONS = [CHECKPOINT, "--max_shard_size", "12KB", "--quiet", "--jobs", "2"]


class Runs:
    """Runs of the export command in one folder."""

    def __init__(self, folder: Path) -> None:
        self.output = folder / "place" / "out"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment |= {"PYTHONPATH": str(DRIVER.parent.parent)}
        self.process = subprocess.Popen(
            [sys.executable, str(DRIVER), CHECKPOINT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(self, *options: str, kill_at: int | None = None, file_size: int | None = None) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        arguments = [*OPTIONS, "--output_folder", str(self.output), *options]
        order = {"arguments": arguments, "kill_at": kill_at, "file_size": file_size}
        print(json.dumps(order), file=self.process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def digests(self) -> dict[str, str]:
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in self.output.iterdir()}

    def beside(self) -> set[str]:
        """What lies beside the output folder, and is seen."""
        place = self.output.parent
        return {path.name for path in place.iterdir() if not path.name.startswith(".")} if place.exists() else set()

    def clear(self) -> None:
        shutil.rmtree(self.output.parent)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    runs = Runs(tmp_path_factory.mktemp("runs"))
    yield runs
    runs.process.terminate()
    runs.process.communicate()


def spread(count: int, points: int) -> list[int]:
    """``points`` numbers from 1 to ``count``, both among them, evenly spread."""
    return sorted({1 + round(i * (count - 1) / (points - 1)) for i in range(points)})


def kill_everywhere(runs: Runs, points: int | None) -> None:
    first = runs.run()
    assert first["code"] == 0
    true = runs.digests()
    runs.clear()
    for at in spread(first["changes"], points or first["changes"]):
        assert runs.run(kill_at=at)["code"] == -9, at
        assert runs.beside() <= {"out"}, at
        assert not runs.output.exists() or runs.digests() == true, at
        assert runs.run("--overwrite")["code"] == 0, at
        assert runs.digests() == true, at
        assert os.listdir(runs.output.parent) == ["out"], at
        runs.clear()


def kill_while_replacing(runs: Runs, points: int | None) -> None:
    assert runs.run("--dtype", "fp32")["code"] == 0
    earlier = runs.digests()
    again = runs.run("--overwrite")
    true = runs.digests()
    assert again["code"] == 0 and true != earlier
    for at in spread(again["changes"], points or again["changes"]):
        assert runs.run("--dtype", "fp32", "--overwrite")["code"] == 0
        assert runs.run("--overwrite", kill_at=at)["code"] == -9, at
        assert runs.digests() in (earlier, true), at
        assert runs.run("--overwrite")["code"] == 0, at
        assert runs.digests() == true, at
        assert os.listdir(runs.output.parent) == ["out"], at
    runs.clear()


def test_a_run_that_is_killed_leaves_nothing_half_made_and_is_finished_by_the_next(runs: Runs) -> None:
    kill_everywhere(runs, points=12)


def test_an_earlier_export_is_there_until_the_new_one_is(runs: Runs) -> None:
    kill_while_replacing(runs, points=6)


@pytest.mark.slow
def test_a_run_may_be_killed_at_every_change_of_the_disk(runs: Runs) -> None:
    kill_everywhere(runs, points=None)


@pytest.mark.slow
def test_a_run_may_be_killed_at_every_change_of_the_disk_while_it_replaces(runs: Runs) -> None:
    kill_while_replacing(runs, points=None)


def test_a_later_run_does_not_write_again_what_was_finished(runs: Runs) -> None:
    whole = runs.run()["changes"]
    runs.clear()
    runs.run(kill_at=whole - 30)
    assert len(list(runs.output.parent.glob(".out.partial/finished/*.json"))) > 1
    rest = runs.run()
    assert rest["code"] == 0 and rest["changes"] < whole - 5
    runs.clear()


@pytest.mark.parametrize("size", [0, 100, 5_000, 10_000])
def test_a_disk_that_takes_no_more_is_exit_5_and_nothing_is_left(size: int, runs: Runs) -> None:
    assert runs.run(file_size=size)["code"] == 5
    assert not runs.output.parent.exists()
