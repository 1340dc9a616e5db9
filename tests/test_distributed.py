"""Folders of torch.distributed.checkpoint: what torch saved, and nothing that is damaged, mixed up or elsewhere."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import SerializationFormat, _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from exporter.checkpoints import open_checkpoint
from exporter.checkpoints.distributed_metadata import read_metadata
from exporter.checksums import check_members
from exporter.errors import CheckpointError, ExportError, IncompleteCheckpointError, RefusedError, UsageError
from exporter.tensors import LazyTensor, SourceFiles
from tests.conftest import Case
from tests.test_hostile_pickles import OTHER, STANDARD, listed, mapped, pickled, text

LLAMA = Case("llama-safetensors")
SAVES = Path(__file__).parent / "sharded_saves.py"
FIRST, SECOND = "__0_0.distcp", "__1_0.distcp"
KEY = "state_dict.0.weight"
Damage = Callable[[Path], Any]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def read(tensor: LazyTensor) -> torch.Tensor:
    with SourceFiles() as files:
        blocks = [block.clone() for block in tensor.blocks(files)]
        check_members(files.pieces)
    return torch.cat(blocks).reshape(tensor.shape) if blocks else torch.empty(tensor.shape, dtype=tensor.dtype.torch)


def assert_equal(folder: Path, truth: dict[str, torch.Tensor]) -> None:
    model = open_checkpoint(folder).model
    assert model is not None and model.keys() == truth.keys()
    for name, tensor in model.items():
        found = read(tensor)
        assert found.dtype is truth[name].dtype and torch.equal(found, truth[name]), name


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The saves of two processes."""
    folder = tmp_path_factory.mktemp("two-ranks")
    subprocess.run([sys.executable, SAVES, folder, "2"], check=True, capture_output=True, timeout=300)
    return folder


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Saves a state dict with this process alone; the folder."""

    def run(state: dict[str, Any], name: str = "saved", **options: Any) -> Path:
        if options:
            dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path / name, **options))
        else:
            dcp.save(state, checkpoint_id=tmp_path / name)
        return tmp_path / name

    return run


# What is read


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2-app", "fsdp1", "columns"])
def test_what_two_ranks_saved_is_the_live_model(two_ranks: Path, name: str) -> None:
    truth = torch.load(two_ranks / f"{name}.truth")
    checkpoint = open_checkpoint(two_ranks / name)
    assert (checkpoint.format, checkpoint.world_size) == ("dcp", 2)
    assert_equal(two_ranks / name, truth)


@pytest.mark.slow
def test_a_mesh_of_four_ranks_is_read(tmp_path: Path) -> None:
    subprocess.run([sys.executable, SAVES, tmp_path, "4"], check=True, capture_output=True, timeout=300)
    for name in ("hsdp", "fsdp-tp"):
        assert_equal(tmp_path / name, torch.load(tmp_path / f"{name}.truth"))
    with pytest.raises(RefusedError, match="without collectives"):
        open_checkpoint(tmp_path / "apart")


def weights() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    return {
        "model.embed.weight": torch.randn(8, 3, generator=generator),
        "transposed": torch.randn(4, 5, generator=generator).t(),
        "half": torch.randn(7, generator=generator).to(torch.bfloat16),
        "view": torch.randn(9, 9, generator=generator)[2:5, 1:4],
        "scalar": torch.tensor(5),
        "empty": torch.zeros(0, 3),
        "mask": torch.tensor([True, False]),
    }


@pytest.mark.parametrize(
    "nest",
    [
        lambda model: model,
        lambda model: {"model": model},
        lambda model: {"state_dict": model, "epoch": 3},
        lambda model: {"app": {"model": model, "optim": {"state": {"half": {"exp_avg": torch.ones(7)}}}}},
        lambda model: {
            "model": model,
            "optimizer_0": {"state": {0: {"step": torch.tensor(1.0)}}},
            "step": torch.tensor(4),
        },
        lambda model: {**model, "optimizer": {"state.half.exp_avg": torch.ones(7), "param_groups.half.lr": 0.1}},
        lambda model: {**model, "state.half.exp_avg": torch.ones(7), "param_groups.half.lr": torch.tensor(0.1)},
        lambda model: {"generator": model},
    ],
)
def test_the_model_is_found_in_a_nested_state_dict(save: Callable[..., Path], nest: Callable[[Any], Any]) -> None:
    assert_equal(save(nest(weights())), weights())


def test_what_is_left_out_is_said(save: Callable[..., Path]) -> None:
    folder = save({"model": weights(), "ema": weights(), "optimizer_0": {"state": {"half": {"step": torch.ones(1)}}}})
    assert open_checkpoint(folder).notes == ("ema is not exported.",)


def test_several_files_and_a_flat_state_dict_are_read(save: Callable[..., Path]) -> None:
    assert_equal(save(weights(), thread_count=3), weights())
    dcp.save(weights(), checkpoint_id=save(weights(), "flat"), planner=dcp.DefaultSavePlanner(flatten_state_dict=False))
    assert_equal(save(weights(), "flat"), weights())


def test_a_metadata_of_many_chunks_is_read(tmp_path: Path) -> None:
    def place(number: int) -> tuple[MetadataIndex, _StorageInfo]:
        return MetadataIndex("weight", (number, 0)), _StorageInfo(FIRST, 64 * number, 64)

    with (tmp_path / ".metadata").open("wb") as file:
        pickle.dump(Metadata({}, {}, dict(map(place, range(5000)))), file)
    assert len(read_metadata(tmp_path / ".metadata").places) == 5000


# Where it lies


def as_trainer_saves(run: Path, step: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """``checkpoint-N`` as accelerate's save_fsdp_model and save_fsdp_optimizer lay it out, without config.json."""
    truth = {name: tensor * scale for name, tensor in LLAMA.truth.items()}
    folder = run / f"checkpoint-{step}"
    dcp.save({"model": truth}, checkpoint_id=folder / "pytorch_model_fsdp_0")
    state = {name: {"exp_avg": torch.zeros_like(tensor)} for name, tensor in truth.items()}
    dcp.save({"optimizer": {"state": state}}, checkpoint_id=folder / "optimizer_0")
    torch.save({}, folder / "scheduler.pt")
    return truth


def copy_config(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in LLAMA.checkpoint.glob("*.json"):
        shutil.copy(path, folder)


def test_the_export_of_a_trainers_run_loads_with_the_models_weights(
    tmp_path: Path, export: Callable[..., tuple[Path, dict[str, Any]]]
) -> None:
    from transformers import AutoModelForCausalLM

    run = tmp_path / "run"
    copy_config(run)
    as_trainer_saves(run, 2)
    truth = as_trainer_saves(run, 10, scale=0.5)
    output, report = export(run, dtype="fp32", verify="load")
    loaded = AutoModelForCausalLM.from_pretrained(output).state_dict()
    assert report["checkpoint"]["format"] == "dcp" and loaded.keys() >= truth.keys()
    for name, tensor in truth.items():
        assert torch.equal(loaded[name][: len(tensor)], tensor), name


@pytest.mark.parametrize("named", ["run/checkpoint-7/pytorch_model_fsdp_0", "run/checkpoint-7", "run"])
@pytest.mark.parametrize("place", ["run/checkpoint-7/pytorch_model_fsdp_0", "run/checkpoint-7", "run"])
def test_config_json_lies_beside_the_chunks_or_above(tmp_path: Path, named: str, place: str) -> None:
    as_trainer_saves(tmp_path / "run", 7)
    copy_config(tmp_path / place)
    checkpoint = open_checkpoint(tmp_path / named)
    assert checkpoint.folder == tmp_path / place
    opened = "run/checkpoint-7" if named == "run" else named
    said = any("config.json" in note for note in checkpoint.notes)
    assert said == (place not in (opened, "run/checkpoint-7/pytorch_model_fsdp_0"))


def test_a_relative_name_and_a_link_to_the_newest_step_are_followed(
    tmp_path: Path, export: Callable[..., tuple[Path, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    dcp.save({"model": LLAMA.truth}, checkpoint_id=tmp_path / "run" / "step-4")
    copy_config(tmp_path / "run")
    (tmp_path / "run" / "newest").symlink_to("step-4")
    monkeypatch.chdir(tmp_path / "run")
    for named in ("newest", "step-4", "../run", "."):
        assert export(Path(named))[1]["checkpoint"]["parameters"] == sum(map(torch.numel, LLAMA.truth.values()))


def test_a_link_out_of_the_named_folder_is_not_followed(save: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(save({"model": weights()}))
    with pytest.raises(CheckpointError, match="model is a symbolic link that leaves the checkpoint folder"):
        open_checkpoint(tmp_path / "run")
    assert_equal(tmp_path / "run" / "model", weights())


def test_a_save_that_did_not_end_is_passed_over(tmp_path: Path) -> None:
    for step in (90, 100):
        dcp.save({"value": torch.tensor(step)}, checkpoint_id=tmp_path / f"step-{step}")
    (tmp_path / "step-100" / ".metadata").unlink()
    assert_equal(tmp_path, {"value": torch.tensor(90)})
    with pytest.raises(IncompleteCheckpointError, match=re.escape("no .metadata, which is written last")):
        open_checkpoint(tmp_path / "step-100")


def test_what_could_mean_two_models_is_refused(save: Callable[..., Path], tmp_path: Path) -> None:
    save({"model": weights()}, "pytorch_model_fsdp_0")
    save({"model": weights()}, "pytorch_model_fsdp_1")
    with pytest.raises(RefusedError, match="Both pytorch_model_fsdp_0"):
        open_checkpoint(tmp_path)
    with pytest.raises(RefusedError, match="several sets of weights"):
        open_checkpoint(save({"student": {"model": weights()}, "teacher": {"model": weights()}}))
    shutil.copy(LLAMA.checkpoint / "model.safetensors", tmp_path / "saved")
    with pytest.raises(RefusedError, match=r"model\.safetensors"):
        open_checkpoint(tmp_path / "saved")


def test_an_optimizers_folder_is_no_model(save: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match="holds no weights of a model"):
        open_checkpoint(save({"optimizer": {"state": {"weight": {"exp_avg": torch.ones(3)}}}}))


def test_a_tag_is_a_usage_error(save: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="There is no tag"):
        open_checkpoint(save(weights()), "global_step1")


# What is refused


def change(edit: Callable[[Metadata], Any]) -> Damage:
    """Load .metadata with torch's own classes, edit it and save it again."""

    def damage(folder: Path) -> None:
        metadata = pickle.loads((folder / ".metadata").read_bytes())
        edit(metadata)
        (folder / ".metadata").write_bytes(pickle.dumps(metadata, 4))

    return damage


def entry(metadata: Metadata) -> TensorStorageMetadata:
    value = metadata.state_dict_metadata[KEY]
    assert isinstance(value, TensorStorageMetadata)
    return value


def relocate(**fields: Any) -> Damage:
    """Change the place of the first rank's chunk of 0.weight."""

    def edit(metadata: Metadata) -> None:
        index = MetadataIndex(KEY, (0, 0))
        metadata.storage_data[index] = replace(metadata.storage_data[index], **fields)

    return change(edit)


def cover(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Damage:
    """Change what .metadata says of the second rank's chunk of 0.weight (5 by 6, of which it has the last 2 rows)."""

    def edit(metadata: Metadata) -> None:
        entry(metadata).chunks[1] = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        index = next(key for key in metadata.storage_data if key.fqn == KEY and key.offset == (3, 0))
        metadata.storage_data[MetadataIndex(KEY, offsets)] = metadata.storage_data.pop(index)

    return change(edit)


def flip(folder: Path) -> None:
    content = bytearray((folder / SECOND).read_bytes())
    value = torch.load(folder.parent / "fsdp1.truth")["0.weight"][3:].numpy().tobytes()
    content[content.index(value) + 5] ^= 4
    (folder / SECOND).write_bytes(content)


def swap_chunks(folder: Path) -> None:
    def edit(metadata: Metadata) -> None:
        places = metadata.storage_data
        first, second = (MetadataIndex(KEY, offset) for offset in ((0, 0), (3, 0)))
        places[first], places[second] = places[second], places[first]

    change(edit)(folder)


DAMAGES: list[tuple[str, Damage, str]] = [
    ("a rank's file is missing", lambda folder: (folder / SECOND).unlink(), f"{SECOND} is missing"),
    ("a rank's file is cut", lambda folder: os.truncate(folder / SECOND, 4000), SECOND),
    ("a rank's file is another's", lambda folder: shutil.copy(folder / FIRST, folder / SECOND), SECOND),
    ("a bit flipped", flip, "CRC-32"),
    (".metadata is cut", lambda folder: os.truncate(folder / ".metadata", 900), ".metadata is damaged"),
    (".metadata is empty", lambda folder: os.truncate(folder / ".metadata", 0), ".metadata is damaged"),
    ("something follows .metadata", lambda folder: (folder / ".metadata").open("ab").write(b"x"), "ends at byte"),
    (
        ".metadata is another pickle",
        lambda folder: (folder / ".metadata").write_bytes(pickle.dumps([1], 4)),
        "expected",
    ),
    ("a hole", cover((4, 0), (1, 6)), "0.weight"),
    ("a hole at the end", change(lambda metadata: entry(metadata).chunks.pop()), "the chunks end at 3, expected 5"),
    ("an overlap", cover((2, 0), (3, 6)), "0.weight"),
    ("a chunk beyond the end", cover((3, 0), (3, 6)), "0.weight"),
    ("a chunk of another rank", swap_chunks, "expected the chunk of state_dict.0.weight"),
    ("a chunk of fewer dimensions", cover((3,), (2,)), "state_dict.0.weight has 2 dimensions"),
    ("another shape", change(lambda metadata: setattr(entry(metadata), "size", torch.Size((5, 7)))), "0.weight"),
    (
        "another dtype",
        change(lambda metadata: setattr(entry(metadata).properties, "dtype", torch.float16)),
        "expected the chunk of state_dict.0.weight at [0, 0], float16",
    ),
    (
        "a chunk without a place",
        change(lambda metadata: metadata.storage_data.pop(MetadataIndex(KEY, (0, 0)))),
        "no place for the chunk of state_dict.0.weight at [0, 0]",
    ),
    ("a chunk elsewhere in its file", relocate(offset=1), "is damaged"),
    ("a chunk beyond its file", relocate(offset=2**40), "should go on to byte"),
    ("a place before the file", relocate(offset=-1), "expected sizes"),
    ("a file above", relocate(relative_path="../elsewhere.distcp"), "expected a file beside it"),
    ("a file by its whole path", relocate(relative_path="/etc/passwd"), "expected a file beside it"),
    ("no file", relocate(relative_path=".."), ".."),
    ("a link that leaves the folder", lambda folder: link_out(folder), "symbolic link"),
]


def link_out(folder: Path) -> None:
    shutil.move(folder / SECOND, folder.parent / "away.distcp")
    (folder / SECOND).symlink_to(folder.parent / "away.distcp")


@pytest.mark.parametrize(("damage", "reason"), [row[1:] for row in DAMAGES], ids=[row[0] for row in DAMAGES])
def test_a_damaged_checkpoint_is_not_read(two_ranks: Path, tmp_path: Path, damage: Damage, reason: str) -> None:
    folder = Path(shutil.copytree(two_ranks / "fsdp1", tmp_path / "fsdp1"))
    shutil.copy(two_ranks / "fsdp1.truth", tmp_path)
    damage(folder)
    with pytest.raises(CheckpointError, match=re.escape(reason)) as error:
        for tensor in (open_checkpoint(folder).model or {}).values():
            read(tensor)
    assert str(tmp_path) not in error.value.message + error.value.hint


def test_the_tensor_properties_of_torch_2_0_are_known(two_ranks: Path, tmp_path: Path) -> None:
    from torch.distributed._shard.sharded_tensor.metadata import TensorProperties

    folder = Path(shutil.copytree(two_ranks / "fsdp1", tmp_path / "fsdp1"))
    change(lambda metadata: setattr(entry(metadata), "properties", TensorProperties(torch.float32)))(folder)
    assert b"sharded_tensor.metadata" in (folder / ".metadata").read_bytes()
    assert_equal(folder, torch.load(two_ranks / "fsdp1.truth"))


def test_two_chunks_at_one_place_are_refused(save: Callable[..., Path]) -> None:
    folder = save({"a": torch.ones(2), "b": torch.zeros(2)})

    def edit(metadata: Metadata) -> None:
        metadata.storage_data[MetadataIndex("a", (0,))] = metadata.storage_data[MetadataIndex("b", (0,))]

    change(edit)(folder)
    with pytest.raises(CheckpointError, match="two chunks lie at byte"):
        open_checkpoint(folder)


def test_a_file_copied_over_another_is_refused(save: Callable[..., Path]) -> None:
    folder = save({"a": torch.randn(64), "b": torch.randn(64)}, thread_count=2)
    first, second = folder.glob("*.distcp")
    shutil.copy(first, second)
    with pytest.raises(CheckpointError, match="one of them is a copy of the other"):
        open_checkpoint(folder)


def test_files_that_are_alike_because_their_weights_are_constant_are_read(save: Callable[..., Path]) -> None:
    truth = {"a.weight": torch.ones(64), "b.weight": torch.ones(64)}
    folder = save(truth, thread_count=2)
    assert len(list(folder.glob("*.distcp"))) == 2
    assert_equal(folder, truth)


@pytest.mark.parametrize(
    ("state", "options", "reason"),
    [
        ({"w": torch.ones(3, dtype=torch.complex64)}, {}, "w has elements that no weight has"),
        (
            {"w": torch.randn(40, 3)},
            {"serialization_format": SerializationFormat.SAFETENSORS},
            "too few for an archive",
        ),
    ],
)
def test_what_cannot_be_right_is_refused(
    save: Callable[..., Path], state: dict[str, Any], options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(RefusedError, match=reason):
        open_checkpoint(save(state, **options))


def test_a_compressed_chunk_is_refused(two_ranks: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(two_ranks / "fsdp1", tmp_path / "fsdp1"))
    relocate(transform_descriptors=["stream.zstd/1"])(folder)
    with pytest.raises(RefusedError, match="compressed or encrypted"):
        open_checkpoint(folder)


@pytest.mark.parametrize("title", [*STANDARD, *OTHER])
def test_a_hostile_metadata_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, title: str) -> None:
    monkeypatch.chdir(tmp_path)
    body = (STANDARD | OTHER)[title]
    for nested in (body, listed(text("weights"), body), mapped(text("weights"), body)):
        Path(".metadata").write_bytes(pickled(nested))
        with pytest.raises(ExportError) as error:
            open_checkpoint(tmp_path)
        assert error.value.exit_code == 3 and error.value.message.isprintable() and len(error.value.message) < 500
        assert os.listdir() == [".metadata"]
