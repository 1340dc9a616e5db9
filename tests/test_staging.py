"""Where an export grows and how it is placed: nothing is lost, and nothing half-made is left."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from exporter.errors import CheckpointError, HubRefusedError, HubUnreachableError, OutputError
from exporter.manifest import MANIFEST_NAME
from exporter.plan import Shard
from exporter.shards import NonFinite, WrittenShard, uncounted, write_file
from exporter.staging import Staging, check_output_folder, place_export, private_place, staging_folder
from exporter.tensors import Member, Piece

KEY = "a" * 64
SOURCES = {"y.pt": Path("/x/y.pt")}


def stage(output: Path, content: str = "new") -> None:
    """A whole export of two files at ``output``."""
    with staging_folder(output, KEY, 1, SOURCES) as staging:
        (staging.folder / MANIFEST_NAME).write_text(content)
        (staging.folder / "config.json").write_text(content)
        place_export(staging, output, overwrite=True)


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
    with pytest.raises(ZeroDivisionError), staging_folder(tmp_path / "a" / "b" / "out", KEY, 1, SOURCES) as staging:
        (staging.folder / "half").write_text("made")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_parent_that_another_process_took_away_does_not_fail_a_run(tmp_path: Path) -> None:
    with staging_folder(tmp_path / "private" / "out", KEY, 1, SOURCES):
        shutil.rmtree(tmp_path / "private")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="the disk has"), staging_folder(tmp_path / "out", KEY, 10**18, SOURCES):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_export_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage(tmp_path / "out", "old")
    monkeypatch.setattr(os, "rename", failing_rename(1, OSError("no other step was needed")))
    stage(tmp_path / "out")
    assert contents(tmp_path / "out") == {MANIFEST_NAME: "new", "config.json": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def without_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that cannot exchange two folders, as NFS."""
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())


@pytest.mark.usefixtures("without_exchange")
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


@pytest.mark.usefixtures("without_exchange")
def test_an_earlier_export_is_back_after_a_crash_between_two_renames(tmp_path: Path) -> None:
    stage(tmp_path / "out", "old")
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (tmp_path / "out").rename(partial / "earlier")
    with staging_folder(tmp_path / "out", KEY, 1, SOURCES):
        assert contents(tmp_path / "out") == {MANIFEST_NAME: "old", "config.json": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def written(staging: Staging, name: str, content: bytes = b"weights") -> WrittenShard:
    """A shard that is written, proven and recorded."""
    file = write_file(name, content, staging.folder)
    shard = WrittenShard(
        file,
        {"w": NonFinite(1, 2)},
        {Member(Path("/x/y.pt"), 64, 100, 7): {Piece(64, 50, 3), Piece(114, 50, 4)}},
    )
    staging.journal.add(shard)
    return shard


def planned(name: str, size: int) -> Shard:
    return cast(Shard, SimpleNamespace(name=name, size=size))


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), HubUnreachableError("", ""), HubRefusedError("", "")])
def test_what_an_interrupted_run_finished_is_taken_over(stop: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(stop)), staging_folder(tmp_path / "out", KEY, 1, SOURCES) as staging:
        first = written(staging, "model-1.safetensors")
        (staging.folder / "model-2.safetensors").write_bytes(b"half")
        raise stop
    assert {path.name for path in tmp_path.iterdir()} == {".out.partial"}
    with staging_folder(tmp_path / "out", KEY, 1, SOURCES) as staging:
        assert staging.journal.finished(planned("model-1.safetensors", 7), uncounted) == first
        assert staging.journal.finished_bytes == 7
        assert staging.journal.finished(planned("model-2.safetensors", 4), uncounted) is None
        assert [path.name for path in staging.folder.iterdir()] == ["model-1.safetensors"]
    assert list(tmp_path.iterdir()) == []


def test_what_was_finished_names_the_files_of_a_checkpoint_that_was_moved(tmp_path: Path) -> None:
    interrupted(tmp_path / "out")
    with staging_folder(tmp_path / "out", KEY, 1, {"y.pt": Path("/moved/y.pt")}) as staging:
        taken_over = staging.journal.finished(planned("model-1.safetensors", 7), uncounted)
        assert taken_over is not None and [member.path for member in taken_over.pieces] == [Path("/moved/y.pt")]


def test_what_was_finished_of_another_checkpoint_is_not_taken_over(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), staging_folder(tmp_path / "out", KEY, 1, SOURCES) as staging:
        written(staging, "model-1.safetensors")
        raise KeyboardInterrupt
    with staging_folder(tmp_path / "out", "b" * 64, 1, SOURCES) as staging:
        assert staging.journal.finished(planned("model-1.safetensors", 7), uncounted) is None
        assert list(staging.folder.iterdir()) == []


@pytest.mark.parametrize("content", [b"weightz", b"weight", b""])
def test_a_finished_shard_that_is_not_what_was_recorded_is_not_taken_over(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), staging_folder(tmp_path / "out", KEY, 1, SOURCES) as staging:
        written(staging, "model-1.safetensors")
        (staging.folder / "model-1.safetensors").write_bytes(content)
        raise KeyboardInterrupt
    with staging_folder(tmp_path / "out", KEY, 1, SOURCES) as staging:
        assert staging.journal.finished(planned("model-1.safetensors", 7), uncounted) is None


@pytest.mark.parametrize("record", [b"", b"{}", b"[]", b'{"file": 1}', b"\xff"])
def test_a_damaged_record_is_none(record: bytes, tmp_path: Path) -> None:
    with staging_folder(tmp_path / "out", KEY, 1, SOURCES) as staging:
        written(staging, "model-1.safetensors")
        (staging.journal.records / "model-1.safetensors.json").write_bytes(record)
        assert staging.journal.finished(planned("model-1.safetensors", 7), uncounted) is None


def test_what_a_failed_run_wrote_goes_away(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError), staging_folder(tmp_path / "out", KEY, 1, SOURCES) as staging:
        written(staging, "model-1.safetensors")
        raise CheckpointError("damaged", "copy")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("leftover", ["key", "export", "finished"])
def test_a_staging_that_lacks_a_part_is_made_anew(leftover: str, tmp_path: Path) -> None:
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / leftover).write_text(KEY)
    stage(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_staging_that_is_a_link_is_neither_believed_nor_removed(tmp_path: Path) -> None:
    forged = tmp_path / "forged"
    forged.mkdir()
    (forged / "key").write_text(KEY)
    (tmp_path / ".out.partial").symlink_to(forged)
    with pytest.raises(OutputError, match=r"^\.out\.partial is there, and is no folder that you made\.$"):
        stage(tmp_path / "out")
    assert [path.name for path in forged.iterdir()] == ["key"]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_staging_that_another_user_made_is_not_believed(tmp_path: Path) -> None:
    os.chown(shutil.copytree(interrupted(tmp_path / "out"), tmp_path / ".other.partial"), 65534, -1)
    with pytest.raises(OutputError, match="no folder that you made"):
        stage(tmp_path / "other")


def test_a_private_place_that_another_user_prepared_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert private_place("name").parent.parent == tmp_path
    (tmp_path / f"export-model-{os.getuid()}").symlink_to(tmp_path)
    with pytest.raises(OutputError, match="no folder that you made") as refusal:
        private_place("name")
    assert "TMPDIR" in refusal.value.hint


def interrupted(output: Path) -> Path:
    """The staging that an interrupted run left for ``output``."""
    with pytest.raises(KeyboardInterrupt), staging_folder(output, KEY, 1, SOURCES) as staging:
        written(staging, "model-1.safetensors")
        raise KeyboardInterrupt
    return output.with_name(f".{output.name}.partial")


def test_a_second_export_to_the_same_place_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    with staging_folder(tmp_path / "out", KEY, 1, SOURCES) as staging:
        (staging.folder / MANIFEST_NAME).write_text("first")
        with (
            pytest.raises(OutputError, match="Another process exports to out"),
            staging_folder(tmp_path / "out", "b" * 64, 1, SOURCES),
        ):
            pass
        place_export(staging, tmp_path / "out", overwrite=False)
    assert contents(tmp_path / "out") == {MANIFEST_NAME: "first"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from exporter.staging import staging_folder\n"
        "with staging_folder(Path(sys.argv[1]), 'a' * 64, 1, {}): os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path / "out")])
    assert killed.returncode == -signal.SIGKILL
    assert {path.name for path in tmp_path.iterdir()} == {".out.lock", ".out.partial"}
    stage(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_files_that_came_to_the_output_folder_meanwhile_are_not_lost(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(OutputError, match="no earlier export"), staging_folder(output, KEY, 1, SOURCES) as staging:
        (staging.folder / MANIFEST_NAME).write_text("new")
        output.mkdir()
        (output / "thesis.txt").write_text("mine")
        place_export(staging, output, overwrite=True)
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
