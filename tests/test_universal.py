"""Universal checkpoints: what ds_to_universal wrote is what the live engine held, and damage is refused by name."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from exporter.checkpoints import open_checkpoint
from exporter.errors import CheckpointError, ExportError, RefusedError, UsageError
from tests.conftest import Case
from tests.test_zero import assert_master_is_true, edit, load, save_again, swap

ZERO2, ZERO3 = Case("tiny-universal-zero2"), Case("tiny-universal-zero3")
TAG = "global_step4_universal"
QUERY, KEY, VALUE = (f"model.layers.0.self_attn.{letter}_proj.weight" for letter in "qkv")
UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
RANK1 = "zero_pp_rank_1_mp_rank_00_model_states.pt"
Export = Callable[..., tuple[Path, dict[str, Any]]]


def parameter(tag: Path, name: str) -> Path:
    return tag / "zero" / name / "fp32.pt"


@pytest.mark.parametrize("case", [ZERO2, ZERO3], ids=lambda case: case.name)
def test_every_parameter_is_the_live_engines_frozen_ones_included(case: Case) -> None:
    checkpoint = open_checkpoint(case.checkpoint)
    assert_master_is_true(checkpoint, case)
    assert checkpoint.weights("master").keys() == case.truth.keys()
    facts = ("format", "zero_stage", "world_size", "tag", "step")
    assert [getattr(checkpoint, fact) for fact in facts] == [case.facts[fact] for fact in facts]


def test_what_was_converted_from_tensor_parallel_ranks_is_refused(tmp_path: Path) -> None:
    folder = ZERO2.copy(tmp_path)
    first = folder / TAG / "mp_rank_00_model_states.pt"
    second = first.with_name("mp_rank_01_model_states.pt")
    shutil.copy(first, second)
    for path in (first, second):
        edit(path, lambda state: state.update(mp_world_size=2))
    with pytest.raises(RefusedError, match="lie in tensor-parallel slices"):
        open_checkpoint(folder)


def beside_what_was_converted(place: Path) -> Path:
    folder = ZERO2.copy(place)
    other = Case("tiny-zero1-aligned").checkpoint
    shutil.copytree(other / "global_step4", folder / "global_step4")
    shutil.copy(other / "latest", folder)
    return folder


def test_a_tag_chooses_the_universal_checkpoint_beside_what_it_was_made_of(tmp_path: Path) -> None:
    folder = beside_what_was_converted(tmp_path)
    assert (open_checkpoint(folder).format, open_checkpoint(folder).notes) == ("zero", ())
    assert open_checkpoint(folder, "global_step4").format == "zero"
    assert open_checkpoint(folder, TAG).format == "universal"
    with pytest.raises(UsageError, match="no tag 'global_step5'"):
        open_checkpoint(folder, "global_step5")


def test_without_latest_universal_the_only_tag_is_read(tmp_path: Path) -> None:
    folder = ZERO3.copy(tmp_path)
    (folder / "latest_universal").unlink()
    opened = open_checkpoint(folder)
    assert (opened.tag, opened.notes) == (TAG, (f"There is no file latest_universal; {TAG} is the only tag.",))


def set_parameter(name: str, value: Any) -> Callable[[Path], None]:
    return lambda tag: torch.save(value, parameter(tag, name))


def reach_out(state: dict[str, Any]) -> None:
    state["param_shapes"][0]["../../../outside"] = torch.Size([1])


REFUSED: list[tuple[str, Case, Callable[[Path], Any], str]] = [
    ("a parameter missing", ZERO2, lambda tag: shutil.rmtree(tag / "zero" / KEY), f"zero/{KEY}/fp32.pt is missing"),
    ("a parameter missing", ZERO3, lambda tag: shutil.rmtree(tag / "zero" / KEY), f"zero/{KEY}/fp32.pt is missing"),
    ("a file missing", ZERO2, lambda tag: parameter(tag, KEY).unlink(), "fp32.pt is missing"),
    (
        "two parameters swapped",
        ZERO3,
        lambda tag: swap(parameter(tag, KEY), parameter(tag, VALUE)),
        f"{KEY}/fp32.pt does",
    ),
    (
        "another shape",
        ZERO2,
        lambda tag: shutil.copy(parameter(tag, DOWN), parameter(tag, UP)),
        r"32 \[4, 20\], expected \[20, 4\]",
    ),
    ("another size", ZERO3, lambda tag: shutil.copy(parameter(tag, QUERY), parameter(tag, KEY)), r"\[16\], expected"),
    ("a parameter of integers", ZERO3, set_parameter(KEY, torch.ones(8, dtype=torch.int32)), "int32"),
    ("a parameter that is none", ZERO2, set_parameter(KEY, {"param": 1}), "no tensor"),
    (
        "a parameter left over",
        ZERO2,
        lambda tag: shutil.copytree(tag / "zero" / KEY, tag / "zero" / "other"),
        "the parameter other",
    ),
    (
        "no optimizer state",
        ZERO3,
        lambda tag: (tag / "zero" / "optimizer_state.pt").unlink(),
        "optimizer_state.pt is mis",
    ),
    (
        "the optimizer state of another stage",
        ZERO3,
        lambda tag: shutil.copy(
            ZERO2.checkpoint / TAG / "zero" / "optimizer_state.pt", tag / "zero" / "optimizer_state.pt"
        ),
        "zero/optimizer_state.pt is of ZeRO-2, the model states are not",
    ),
    ("a rank's model states missing", ZERO3, lambda tag: (tag / RANK1).unlink(), f"{RANK1} is missing"),
    (
        "the last rank's model states missing",
        ZERO3,
        lambda tag: (tag / RANK1.replace("1", "2", 1)).unlink(),
        "model states of 2 ranks, but 3 were converted",
    ),
    ("ranks swapped", ZERO3, lambda tag: swap(tag / RANK1, tag / RANK1.replace("1", "0", 1)), "was saved as"),
    ("a name that leads out", ZERO2, lambda tag: edit(tag / "mp_rank_00_model_states.pt", reach_out), "is missing"),
    (
        "a link out of the folder",
        ZERO2,
        lambda tag: (
            shutil.move(parameter(tag, KEY), tag.parent.parent / "fp32.pt"),
            parameter(tag, KEY).symlink_to(tag.parent.parent / "fp32.pt"),
        ),
        "symbolic link",
    ),
]


@pytest.mark.parametrize(
    ("case", "damage", "reason"), [row[1:] for row in REFUSED], ids=[f"{row[0]}-{row[1].name}" for row in REFUSED]
)
def test_a_damaged_folder_is_refused_in_one_line(
    case: Case, damage: Callable[[Path], Any], reason: str, tmp_path: Path
) -> None:
    folder = case.copy(tmp_path)
    damage(folder / TAG)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert re.search(reason, caught.value.message), caught.value.message
    assert "\n" not in caught.value.message + caught.value.hint
    assert str(tmp_path) not in caught.value.message


def test_parameters_of_zero2_that_were_swapped_are_not_what_the_copy_says(export: Export, tmp_path: Path) -> None:
    folder = ZERO2.copy(tmp_path)
    swap(parameter(folder / TAG, KEY), parameter(folder / TAG, VALUE))
    with pytest.raises(CheckpointError, match="is not what the model's own copy says"):
        export(folder, weights="master", prompt_format="none")


@pytest.mark.parametrize("case", [ZERO2, ZERO3], ids=lambda case: case.name)
def test_a_flipped_bit_is_found(case: Case, export: Export, tmp_path: Path) -> None:
    folder = case.copy(tmp_path)
    tensor = open_checkpoint(folder).weights("master")["model.norm.weight"]
    path = parameter(folder / TAG, "model.norm.weight")
    content = bytearray(path.read_bytes())
    content[tensor.extents[0].offset + 12] ^= 1  # type: ignore[attr-defined]
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight/fp32\.pt is damaged: the CRC-32"):
        export(folder, weights="master", prompt_format="none")


def test_every_error_of_opening_is_an_expected_one(tmp_path: Path) -> None:
    folder = ZERO3.copy(tmp_path)
    path = folder / TAG / "zero" / "optimizer_state.pt"
    state = load(path)
    odd: list[Any] = [None, 0, -1, "x", [], {}, [None], {"a": 1}, [[0]], torch.ones(2), [torch.ones(2)]]
    for value in odd:
        for key in ("zero_stage", "partition_count", "fp32_flat_groups"):
            torch.save(state | {key: value}, path)
            _open_or_refuse(folder)
    save_again(path)
    for value in odd:
        torch.save(value, parameter(folder / TAG, KEY))
        _open_or_refuse(folder)


def _open_or_refuse(folder: Path) -> None:
    try:
        open_checkpoint(folder)
    except ExportError as error:
        assert "\n" not in error.message


def test_a_folder_of_parameters_that_is_a_link_out_of_the_checkpoint_is_not_read(tmp_path: Path) -> None:
    checkpoint = Case("tiny-universal-zero2").copy(tmp_path)
    place = checkpoint / "global_step4_universal" / "zero"
    place.symlink_to(place.rename(tmp_path / "elsewhere"))
    with pytest.raises(CheckpointError, match="zero is a symbolic link that leaves the checkpoint folder"):
        open_checkpoint(checkpoint)
