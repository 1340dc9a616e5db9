"""DeepSpeed without ZeRO: masters get the names that the live engine knew them by, or none at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from exporter.checkpoints import open_checkpoint
from exporter.checkpoints.stage0 import name_masters
from exporter.checkpoints.torch_file import read_torch_file
from exporter.errors import CheckpointError
from tests.conftest import Case
from tests.test_zero import MODEL, STEP, assert_master_is_true, edit, read

BF16 = Case("tiny-stage0-bf16")
SIXTEEN_BITS = [BF16, Case("tiny-stage0-fp16-tied"), Case("tiny-stage0-fp16-fused")]
FP32 = Case("tiny-stage0-fp32")
Export = Callable[..., tuple[Path, dict[str, Any]]]


@pytest.mark.parametrize("case", SIXTEEN_BITS, ids=lambda case: case.name)
def test_every_master_has_the_name_that_the_live_engine_knows_it_by(case: Case) -> None:
    checkpoint = open_checkpoint(case.checkpoint)
    assert (checkpoint.format, checkpoint.zero_stage, checkpoint.world_size, checkpoint.notes) == ("zero16", 0, 2, ())
    assert_master_is_true(checkpoint, case)


@pytest.mark.parametrize("case", [*SIXTEEN_BITS, FP32], ids=lambda case: case.name)
def test_an_export_in_fp32_is_the_live_engines_masters(case: Case, export: Export) -> None:
    folder, report = export(case.checkpoint, dtype="fp32", prompt_format="none")
    assert report["checkpoint"]["weights"] == ("model" if case is FP32 else "master")
    written = load_file(folder / "model.safetensors")
    truth = case.truth
    assert written.keys() == truth.keys() - case.facts["tied"].keys()
    for name, value in written.items():
        assert torch.equal(value, truth[name]), name


def swap_keys_and_values(optimizer: dict[str, Any]) -> None:
    group = optimizer["fp32_groups"][0]
    group[2], group[3] = group[3], group[2]


def flatten_first(optimizer: dict[str, Any]) -> None:
    group = optimizer["fp32_groups"][0]
    group[0] = group[0].flatten()


MISFITS: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    ("two of one shape in another order", swap_keys_and_values),
    ("one left over", lambda optimizer: optimizer["fp32_groups"][1].append(torch.ones(4))),
    ("one too few", lambda optimizer: optimizer["fp32_groups"][1].pop()),
    ("one of another shape", flatten_first),
    ("16-bit ones", lambda optimizer: optimizer.update(fp32_groups=[[torch.ones(4).half()]])),
    ("a tensor in place of a group", lambda optimizer: optimizer.update(fp32_groups=[torch.ones(4)])),
    ("a number", lambda optimizer: optimizer.update(fp32_groups=1)),
]


@pytest.mark.parametrize("change", [row[1] for row in MISFITS], ids=[row[0] for row in MISFITS])
def test_masters_that_do_not_fit_have_no_names_and_the_copy_is_exported(
    change: Callable[[dict[str, Any]], Any], tmp_path: Path
) -> None:
    folder = BF16.copy(tmp_path)
    edit(folder / STEP / MODEL, lambda state: change(state["optimizer"]))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.master is None
    assert "its own copy is exported" in checkpoint.notes[0]
    assert checkpoint.model is not None
    for name, value in BF16.truth.items():
        assert torch.equal(read(checkpoint.model[name]), value.bfloat16()), name


def test_a_flipped_bit_in_a_master_is_damage_whether_it_shows_in_the_copy_or_not(
    export: Export, tmp_path: Path
) -> None:
    master = open_checkpoint(BF16.checkpoint).weights("master")["model.norm.weight"]
    for byte in (0, 3):
        folder = BF16.copy(tmp_path / str(byte))
        with (folder / STEP / MODEL).open("r+b") as file:
            file.seek(master.extents[0].offset + byte)  # type: ignore[attr-defined]
            value = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([value ^ 1]))
        with pytest.raises(CheckpointError, match="is damaged: the CRC-32"):
            export(folder, dtype="fp32", prompt_format="none")


def test_a_master_that_only_starts_like_the_copy_is_refused_while_it_is_written(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exporter.tensors.SAMPLE_ELEMENTS", 8)
    folder = BF16.copy(tmp_path)
    edit(folder / STEP / MODEL, lambda state: state["optimizer"]["fp32_groups"][0][0].data[-1].mul_(2))
    assert open_checkpoint(folder).master is not None
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight .* is not what the model's own copy says"):
        export(folder, dtype="fp32", prompt_format="none")


@pytest.mark.parametrize("key", ["fp32_groups", "fp32_groups_flat"])
def test_of_two_groups_that_both_fit_neither_is_guessed(key: str, tmp_path: Path) -> None:
    """Masters that the cast makes equal: nothing but the order of the groups would tell them apart."""
    masters = [torch.full((4,), 1 + 1e-4), torch.full((4,), 1 - 1e-4)]
    groups = [[master] for master in masters] if key == "fp32_groups" else masters
    torch.save({"model": {name: torch.ones(4).bfloat16() for name in "ab"}, "optimizer": {key: groups}}, tmp_path / "a")
    saved = read_torch_file(tmp_path / "a").value
    assert name_masters(saved["model"], saved["optimizer"]) is None
    one = {key: [[torch.cat(masters[:1]), masters[1]]] if key == "fp32_groups" else [torch.cat(masters)]}
    torch.save({"model": {name: torch.ones(4).bfloat16() for name in "ab"}, "optimizer": one}, tmp_path / "a")
    saved = read_torch_file(tmp_path / "a").value
    named = name_masters(saved["model"], saved["optimizer"])
    assert named is not None
    assert [read(named[name]).tolist() for name in "ab"] == [master.tolist() for master in masters]
