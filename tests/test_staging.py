"""Where an export grows and how it is placed: nothing is lost, and nothing half-made is left."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exporter.errors import OutputError
from exporter.manifest import MANIFEST_NAME
from exporter.staging import check_output_folder, place, staging_folder


def stage(output: Path, content: str = "new") -> None:
    """A whole export of two files at ``output``."""
    with staging_folder(output, 1) as folder:
        (folder / MANIFEST_NAME).write_text(content)
        (folder / "config.json").write_text(content)
        place(folder, output)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def failing_rename(at: int, error: BaseException) -> Callable[[Any, Any], None]:
    """os.rename, which raises ``error`` when it is called for the ``at``-th time."""
    rename, calls = os.rename, [0]

    def fail(source: Any, target: Any) -> None:
        calls[0] += 1
        if calls[0] == at:
            raise error
        rename(source, target)

    return fail


def test_a_finished_export_is_placed_with_the_modes_of_the_umask(tmp_path: Path) -> None:
    stage(tmp_path / "a" / "out")
    assert contents(tmp_path / "a" / "out") == {MANIFEST_NAME: "new", "config.json": "new"}
    assert (tmp_path / "a" / "out").stat().st_mode & 0o777 == 0o755
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]


def test_the_current_folder_can_be_the_output_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    check_output_folder(Path("."), tmp_path / "checkpoint", overwrite=False)
    stage(Path("."))
    assert contents(tmp_path / "here") == {MANIFEST_NAME: "new", "config.json": "new"}


def test_a_failure_leaves_no_staging_folder_and_no_parent(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), staging_folder(tmp_path / "a" / "b" / "out", 1) as folder:
        (folder / "half").write_text("made")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="the disk has"), staging_folder(tmp_path / "out", 10**18):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_an_earlier_export_is_back_when_the_new_one_cannot_be_placed(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage(tmp_path / "out", "old")
    with pytest.raises((OutputError, KeyboardInterrupt)), monkeypatch.context() as patch:
        patch.setattr(os, "rename", failing_rename(2, error))
        stage(tmp_path / "out")
    assert contents(tmp_path / "out") == {MANIFEST_NAME: "old", "config.json": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_files_that_came_to_the_output_folder_meanwhile_are_not_lost(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(OutputError, match="no earlier export"), staging_folder(output, 1) as folder:
        (folder / MANIFEST_NAME).write_text("new")
        output.mkdir()
        (output / "thesis.txt").write_text("mine")
        place(folder, output)
    assert contents(output) == {"thesis.txt": "mine"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_mount_point_is_refused_because_no_rename_replaces_it(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="mount point"):
        check_output_folder(Path("/proc"), tmp_path / "checkpoint", overwrite=True)


@pytest.mark.parametrize("name", ["a" * 300, "loop/out", "file/out"])
def test_a_place_that_cannot_be_is_an_output_error(name: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        check_output_folder(tmp_path / name, tmp_path / "checkpoint", overwrite=False)
        stage(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]
