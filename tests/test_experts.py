"""Expert-parallel folders: every expert under its own number, with the master weights of the rank that holds it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from exporter.checkpoints import open_checkpoint
from exporter.errors import CheckpointError, ExportError, IncompleteCheckpointError, RefusedError
from tests.conftest import Case
from tests.test_zero import edit, read

EXPERTS = Case("experts-zero2")
EXPERT = "layer_1_expert_2_mp_rank_00_model_states.pt"
Export = Callable[..., tuple[Path, dict[str, Any]]]


def test_masters_and_copies_are_the_live_weights() -> None:
    checkpoint = open_checkpoint(EXPERTS.checkpoint)
    model, master = checkpoint.weights("model"), checkpoint.weights("master")
    assert master.keys() == model.keys() == EXPERTS.truth.keys()
    for name, value in EXPERTS.truth.items():
        assert torch.equal(read(master[name]), value), name
        assert torch.equal(read(model[name]), value.to(torch.bfloat16)), name


def test_a_class_with_the_same_names_is_exported(export: Export) -> None:
    folder, _ = export(EXPERTS.checkpoint, dtype="fp32", prompt_format="none", trust_remote_code=True)
    written = load_file(folder / "model.safetensors")
    assert written.keys() == EXPERTS.truth.keys()
    assert all(torch.equal(value, EXPERTS.truth[name]) for name, value in written.items())


def test_an_expert_of_another_step_is_found_without_being_asked(tmp_path: Path, export: Export) -> None:
    checkpoint = EXPERTS.copy(tmp_path)
    edit(checkpoint / "global_step4" / EXPERT, lambda state: next(iter(state.values())).mul_(2))
    with pytest.raises(ExportError, match=r"deepspeed_experts\.2\."):
        export(checkpoint, prompt_format="none", trust_remote_code=True)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    checkpoint = EXPERTS.copy(tmp_path)
    (checkpoint / "global_step4" / EXPERT).unlink()
    with pytest.raises(IncompleteCheckpointError, match=r"Expert 2 of layer 1 .* has no file"):
        open_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("other", "fault"),
    [
        (EXPERT.replace("layer_1", "layer_0"), "holds an expert of another layer"),
        (EXPERT.replace("expert_2", "expert_3"), "expected tensors of expert 2 alone"),
    ],
)
def test_another_expert_is_found_also_where_it_was_saved_anew(other: str, fault: str, tmp_path: Path) -> None:
    checkpoint = EXPERTS.copy(tmp_path)
    path = checkpoint / "global_step4" / EXPERT
    path.write_bytes(path.with_name(other).read_bytes())
    edit(path, lambda state: None)
    with pytest.raises(CheckpointError, match=fault):
        open_checkpoint(checkpoint)


def test_experts_that_autoep_put_together_are_refused(tmp_path: Path) -> None:
    checkpoint = EXPERTS.copy(tmp_path)
    edit(
        checkpoint / "global_step4" / "mp_rank_00_model_states.pt",
        lambda state: state.update(ds_autoep_layers=[{"num_experts": 4}]),
    )
    with pytest.raises(RefusedError, match="AutoEP"):
        open_checkpoint(checkpoint)
