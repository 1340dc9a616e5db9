"""Tensor-parallel folders: joined to what the live engine held, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from exporter.checkpoints import open_checkpoint, tensor_parallel
from exporter.checkpoints.tensor_parallel import JoinedTensor, Strip
from exporter.errors import CheckpointError, IncompleteCheckpointError, RefusedError
from exporter.tensors import DType, Extent, SourceFiles, StoredTensor
from tests.conftest import Case
from tests.test_zero import edit, read

LLAMA, NEOX, STAGE0 = Case("llama-tp-zero2"), Case("neox-tp-zero3"), Case("tiny-tp-stage0")
CASES = [LLAMA, NEOX, STAGE0]
INFO = "universal_checkpoint_info"
NORM = "model.norm.weight"


def model_states(checkpoint: Path, rank: int) -> Path:
    return checkpoint / "global_step4" / f"mp_rank_{rank:02d}_model_states.pt"


def change_layouts(checkpoint: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the layouts by name pattern that the model states of both ranks repeat."""
    for rank in range(2):
        edit(model_states(checkpoint, rank), lambda state: change(state[INFO]["affine_map"]["params"]))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_joined_masters_are_the_live_ones(case: Case) -> None:
    master = open_checkpoint(case.checkpoint).weights("master")
    assert master.keys() == case.truth.keys()
    for name, value in case.truth.items():
        assert torch.equal(read(master[name]), value), name


@pytest.mark.parametrize("case", [LLAMA, STAGE0], ids=lambda case: case.name)
def test_the_joined_copy_is_the_live_masters_cast(case: Case) -> None:
    model = open_checkpoint(case.checkpoint).weights("model")
    assert model.keys() == case.truth.keys()
    for name, value in case.truth.items():
        assert torch.equal(read(model[name]), value.to(torch.bfloat16)), name


def test_masters_of_one_rank_that_have_no_names_leave_the_copy(tmp_path: Path) -> None:
    checkpoint = STAGE0.copy(tmp_path)
    edit(model_states(checkpoint, 1), lambda state: state["optimizer"]["fp32_groups"][0].reverse())
    opened = open_checkpoint(checkpoint)
    assert opened.master is None
    assert opened.notes[-1].startswith("The fp32 master weights have no names")
    assert opened.weights("model").keys() == STAGE0.truth.keys()


def test_a_joined_tensor_names_the_files_of_all_ranks() -> None:
    weight = open_checkpoint(LLAMA.checkpoint).weights("model")["lm_head.weight"]
    assert weight.paths == {model_states(LLAMA.checkpoint, rank) for rank in range(2)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_blocks_smaller_than_a_row_join_to_the_same_tensor(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    for nbytes in (8, 200):
        monkeypatch.setattr(tensor_parallel, "BLOCK_BYTES", nbytes)
        for name, tensor in open_checkpoint(case.checkpoint).weights("master").items():
            with SourceFiles() as files:
                blocks = [block.clone() for block in tensor.blocks(files)]
            assert max(block.nbytes for block in blocks) <= nbytes
            assert torch.equal(torch.cat(blocks).reshape(tensor.shape), case.truth[name]), name


def test_a_weight_that_should_be_the_same_on_all_ranks_and_is_not_is_refused(tmp_path: Path) -> None:
    checkpoint = LLAMA.copy(tmp_path)
    edit(model_states(checkpoint, 1), lambda state: state["module"][NORM].view(torch.int16)[3:4].add_(1))
    tensor = open_checkpoint(checkpoint).weights("model")[NORM]
    with pytest.raises(
        RefusedError, match=r"model\.norm\.weight should be the same on the tensor-parallel ranks 0 and 1"
    ):
        read(tensor)


def test_without_a_layout_for_every_weight_nothing_is_guessed(tmp_path: Path) -> None:
    checkpoint = LLAMA.copy(tmp_path)
    change_layouts(checkpoint, lambda layouts: layouts.pop(r"^lm_head\.weight$"))
    with pytest.raises(RefusedError, match=r"does not say how lm_head\.weight was cut"):
        open_checkpoint(checkpoint)


def test_a_checkpoint_without_layouts_is_refused(tmp_path: Path) -> None:
    checkpoint = LLAMA.copy(tmp_path)
    edit(model_states(checkpoint, 1), lambda state: state.pop(INFO))
    with pytest.raises(RefusedError, match="does not say how the weights were cut"):
        open_checkpoint(checkpoint)


@pytest.mark.parametrize(
    "change",
    [
        lambda piece: piece.update(scale=0.5),
        lambda piece: piece["source"].__setitem__(0, 16),
        lambda piece: piece["source"].__setitem__(1, [1, 16]),
        lambda piece: piece.update(shape=[140, 8]),
        lambda piece: piece.pop("dest"),
    ],
    ids=["scaled", "overlapping", "transposed", "cut twice", "without a place"],
)
def test_a_layout_of_an_unknown_kind_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    checkpoint = LLAMA.copy(tmp_path)
    change_layouts(checkpoint, lambda layouts: change(layouts[r"^lm_head\.weight$"]["ranks"][1]["pieces"][0]))
    with pytest.raises(RefusedError, match=r"lm_head\.weight was cut .* in a way that is not known"):
        open_checkpoint(checkpoint)


def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    checkpoint = LLAMA.copy(tmp_path)
    for path in checkpoint.glob("*/*mp_rank_01*"):
        path.unlink()
    with pytest.raises(IncompleteCheckpointError, match="one of 2 model-parallel ranks"):
        open_checkpoint(checkpoint)


def test_a_rank_of_another_step_is_found(tmp_path: Path) -> None:
    checkpoint = LLAMA.copy(tmp_path)
    edit(model_states(checkpoint, 1), lambda state: state.update(global_steps=3))
    with pytest.raises(CheckpointError, match="global_steps 3"):
        open_checkpoint(checkpoint)


def test_optimizer_shards_of_another_step_are_found(tmp_path: Path) -> None:
    checkpoint = NEOX.copy(tmp_path)
    for path in checkpoint.glob("*/*_optim_states.pt"):
        step = 3 if "mp_rank_01" in path.name else 4
        edit(
            path,
            lambda state, step=step: state["optimizer_state_dict"]["optimizer_state_dict"].update(
                state={0: {"step": step}}
            ),
        )
    with pytest.raises(CheckpointError, match=r"is of optimizer step 3, .* of step 4"):
        open_checkpoint(checkpoint)


def test_a_copy_of_another_rank_is_found_also_where_it_was_saved_anew(tmp_path: Path) -> None:
    checkpoint = LLAMA.copy(tmp_path)
    for path in checkpoint.glob("*/*_optim_states.pt"):
        path.unlink()
    first, second = (model_states(checkpoint, rank) for rank in range(2))
    second.write_bytes(first.read_bytes())
    edit(second, lambda state: None)
    with pytest.raises(CheckpointError, match="one is a copy"):
        open_checkpoint(checkpoint)


def test_swapped_ranks_are_found_by_the_names_in_their_archives(tmp_path: Path) -> None:
    checkpoint = LLAMA.copy(tmp_path)
    first, second = (model_states(checkpoint, rank) for rank in range(2))
    spare = first.with_suffix(".spare")
    first.rename(spare), second.rename(first), spare.rename(second)
    with pytest.raises(CheckpointError, match="was saved as"):
        open_checkpoint(checkpoint)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("nbytes", [8, 64, 4096])
def test_several_strips_of_each_slice_lie_where_torch_split_them(
    axis: int, nbytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_parallel, "BLOCK_BYTES", nbytes)
    whole = torch.arange(12.0**3).reshape(12, 12, 12)
    thirds = [third.chunk(2, dim=axis) for third in whole.chunk(3, dim=axis)]
    slices = [torch.cat([third[rank] for third in thirds], dim=axis).contiguous() for rank in range(2)]
    stored = []
    for rank, part in enumerate(slices):
        path = tmp_path / f"{rank}.bin"
        path.write_bytes(part.numpy().tobytes())
        stored.append(StoredTensor(tuple(part.shape), DType.F32, (Extent(path, 0, DType.F32, part.numel()),)))
    strips = tuple((Strip(rank, stored[rank], 2 * third, 2),) for third in range(3) for rank in range(2))
    assert torch.equal(read(JoinedTensor((12, 12, 12), DType.F32, "qkv", axis, strips)), whole)
