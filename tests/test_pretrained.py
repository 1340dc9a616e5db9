"""Hugging Face folders: what from_pretrained would read, and nothing that is damaged, left over or elsewhere."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from exporter.checkpoints import open_checkpoint
from exporter.errors import CheckpointError, ExportError, IncompleteCheckpointError, RefusedError, UsageError
from tests.conftest import Case

SHARDED, SINGLE, BIN = Case("llama-safetensors-sharded"), Case("llama-safetensors"), Case("falcon-bin-sharded")
INDEX, BIN_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
Damage = Callable[[Path], Any]


def edit_index(change: Callable[[dict[str, str]], Any], index: str = INDEX) -> Damage:
    """Change the weight map."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / index).read_text())
        change(content["weight_map"])
        (folder / index).write_text(json.dumps(content))

    return damage


def place_all(file: str) -> Damage:
    """Let the index place every tensor in ``file``."""
    return edit_index(lambda weight_map: weight_map.update(dict.fromkeys(weight_map, file)))


def name_twice(folder: Path) -> None:
    """Name one tensor in both shards; a JSON reader takes the last."""
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(text.replace('"weight_map": {', f'"weight_map": {{"lm_head.weight": "{SECOND}",', 1))


def link_out(folder: Path) -> None:
    shutil.move(folder / FIRST, folder.parent / "away.safetensors")
    (folder / FIRST).symlink_to(folder.parent / "away.safetensors")


def pipe(folder: Path) -> None:
    (folder / FIRST).unlink()
    os.mkfifo(folder / FIRST)


def save(value: Any) -> Damage:
    return lambda folder: torch.save(value, folder / "pytorch_model-00001-of-00002.bin")


DAMAGES: list[tuple[str, Case, Damage, str]] = [
    ("a shard is missing", SHARDED, lambda folder: (folder / SECOND).unlink(), f"{SECOND} is missing"),
    ("the index is missing", SHARDED, lambda folder: (folder / INDEX).unlink(), f"{INDEX} is missing"),
    (
        "the index of .bin files is missing",
        BIN,
        lambda folder: (folder / BIN_INDEX).unlink(),
        f"{BIN_INDEX} is missing",
    ),
    (
        "a shard that the index does not name",
        SHARDED,
        lambda folder: shutil.copy(folder / FIRST, folder / "model-00003-of-00003.safetensors"),
        "model-00003-of-00003.safetensors is there, but",
    ),
    (
        "a shard copied over another",
        SHARDED,
        lambda folder: shutil.copy(folder / FIRST, folder / SECOND),
        f"{SECOND} lacks",
    ),
    (
        "a shard copied over another",
        BIN,
        lambda folder: shutil.copy(
            folder / "pytorch_model-00001-of-00002.bin", folder / "pytorch_model-00002-of-00002.bin"
        ),
        "pytorch_model-00002-of-00002.bin lacks",
    ),
    (
        "a tensor that the index leaves out",
        SHARDED,
        edit_index(lambda names: names.pop("model.norm.weight")),
        "holds the tensor model.norm.weight, which",
    ),
    (
        "a tensor that the index makes up",
        SHARDED,
        edit_index(lambda names: names.update(other=FIRST)),
        "lacks the tensor",
    ),
    ("a tensor that the index names twice", SHARDED, name_twice, "names a key twice"),
    ("every tensor in one of two shards", SHARDED, place_all(FIRST), f"{SECOND} is there"),
    ("a file outside", SHARDED, place_all("../model.safetensors"), "is there|'../model.safetensors'"),
    ("a name that no file can have", SHARDED, edit_index(lambda names: names.update(a="\0.safetensors")), "weight_map"),
    ("a name that is no text", SHARDED, edit_index(lambda names: names.update(a="\ud800.safetensors")), "weight_map"),
    ("a name of two lines", SHARDED, edit_index(lambda names: names.update({"a\nb": FIRST})), "weight_map"),
    ("a very long name", SHARDED, edit_index(lambda names: names.update(a="x" * 5000)), "weight_map"),
    ("an absolute path", SHARDED, edit_index(lambda names: names.update(a="/etc/x.bin")), "'/etc/x.bin'"),
    ("an index without a map", SHARDED, lambda folder: (folder / INDEX).write_text("{}"), "no weight_map"),
    ("an index that is no object", SHARDED, lambda folder: (folder / INDEX).write_text("[]"), "expected a JSON object"),
    ("an index that is no JSON", SHARDED, lambda folder: (folder / INDEX).write_text("{"), "not valid JSON"),
    (
        "an index that is nested deeply",
        SHARDED,
        lambda folder: (folder / INDEX).write_text("[" * 10**6),
        "not valid JSON",
    ),
    (
        "an index of many values",
        SHARDED,
        lambda folder: (folder / INDEX).write_text("[" + "[]," * 5_000_000),
        "too many",
    ),
    ("a link out of the folder", SHARDED, link_out, f"{FIRST} is a symbolic link"),
    ("a pipe", SHARDED, pipe, f"{FIRST} is not a regular file"),
    ("an empty shard", SHARDED, lambda folder: (folder / FIRST).write_bytes(b""), f"{FIRST} is damaged"),
    ("a list in a .bin file", BIN, save([1]), "not a mapping"),
    ("a name of two lines in a .bin file", BIN, save({"a\nb": torch.ones(1)}), "not a mapping"),
    ("complex numbers in a .bin file", BIN, save({"a": torch.ones(1, dtype=torch.complex64)}), "not a mapping"),
]


@pytest.mark.parametrize(
    ("case", "damage", "reason"), [row[1:] for row in DAMAGES], ids=[f"{row[0]}-{row[1].name}" for row in DAMAGES]
)
def test_a_damaged_folder_is_refused_in_one_line(case: Case, damage: Damage, reason: str, tmp_path: Path) -> None:
    checkpoint = case.copy(tmp_path)
    damage(checkpoint)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(checkpoint)
    assert re.search(reason, caught.value.message), caught.value.message
    assert "\n" not in caught.value.message + caught.value.hint
    assert str(tmp_path) not in caught.value.message
    assert caught.value.exit_code == 3


def test_a_file_outside_is_not_read_where_no_shard_is_left_over(tmp_path: Path) -> None:
    checkpoint = SINGLE.copy(tmp_path)
    weight_map = dict.fromkeys(SINGLE.truth, "../model.safetensors")
    (checkpoint / "model.safetensors").rename(tmp_path / "model.safetensors")
    (checkpoint / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"names the file '\.\./model\.safetensors'"):
        open_checkpoint(checkpoint)


@pytest.mark.parametrize("left_over", [INDEX, FIRST])
def test_a_single_file_beside_what_another_save_left_is_refused(left_over: str, tmp_path: Path) -> None:
    checkpoint = SINGLE.copy(tmp_path)
    shutil.copy(SHARDED.checkpoint / left_over, checkpoint)
    with pytest.raises(RefusedError, match=f"Both model.safetensors and {left_over} are there"):
        open_checkpoint(checkpoint)


def test_files_of_other_formats_beside_the_weights_do_not_matter(tmp_path: Path) -> None:
    checkpoint = SHARDED.copy(tmp_path)
    for name in ("consolidated.00.pth", "model.safetensors.bak", "training_args.bin", "pytorch_model.bin"):
        (checkpoint / name).write_bytes(b"?")
    assert open_checkpoint(checkpoint).weights("model").keys() == SHARDED.truth.keys()


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in SHARDED.checkpoint.iterdir():
        shutil.copy(path, blobs / f"blob-of-{path.stem}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob-of-{path.stem}")
    assert open_checkpoint(snapshot).weights("model").keys() == SHARDED.truth.keys()


def test_a_tag_that_a_folder_cannot_have_is_refused() -> None:
    with pytest.raises(UsageError, match="no tag 'global_step4'"):
        open_checkpoint(SINGLE.checkpoint, "global_step4")


def test_a_run_falls_back_to_its_older_checkpoint_and_says_so(tmp_path: Path) -> None:
    for step in (5, 10):
        shutil.copytree(SHARDED.checkpoint, tmp_path / f"checkpoint-{step}")
    assert open_checkpoint(tmp_path).folder.name == "checkpoint-10"
    (tmp_path / "checkpoint-10" / INDEX).unlink()
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.folder.name == "checkpoint-5"
    assert checkpoint.notes[0].startswith(f"checkpoint-10 is incomplete and is not exported: {INDEX} is missing")
    (tmp_path / "checkpoint-5" / FIRST).unlink()
    with pytest.raises(IncompleteCheckpointError):
        open_checkpoint(tmp_path)


def test_folders_without_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        open_checkpoint(tmp_path)
    with pytest.raises(UsageError, match="no checkpoint folder 'gone'"):
        open_checkpoint(tmp_path / "gone")


def test_every_prefix_of_an_index_is_refused(tmp_path: Path) -> None:
    checkpoint = SHARDED.copy(tmp_path)
    whole = (checkpoint / INDEX).read_bytes().rstrip()
    for length in range(0, len(whole), 37):
        (checkpoint / INDEX).write_bytes(whole[:length])
        with pytest.raises(ExportError, match=INDEX):
            open_checkpoint(checkpoint)
