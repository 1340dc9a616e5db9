"""Pipeline folders: exported where the model's class says which module each layer is, else refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from exporter.architecture import ask_architecture, name_layers
from exporter.checkpoints import open_checkpoint
from exporter.errors import CheckpointError, ExportError, IncompleteCheckpointError, RefusedError
from exporter.tensors import DType, StoredTensor
from tests.conftest import Case
from tests.test_zero import edit

PLAIN, TIED = Case("llama-pipeline"), Case("llama-pipeline-tied")
Export = Callable[..., tuple[Path, dict[str, Any]]]


def tensors(**layers: dict[str, list[int]]) -> dict[str, StoredTensor]:
    return {
        f"{layer[1:]}.{name}": StoredTensor(tuple(shape), DType.F32, ())
        for layer, shapes in layers.items()
        for name, shape in shapes.items()
    }


def architecture(**changes: Any) -> Any:
    config = json.loads((PLAIN.checkpoint / "config.json").read_text()) | changes
    return ask_architecture(config, {}, trust_remote_code=False)


@pytest.mark.parametrize("case", [PLAIN, TIED], ids=lambda case: case.name)
@pytest.mark.parametrize("weights", ["master", "model"])
def test_an_exported_pipeline_is_the_live_model(case: Case, weights: str, export: Export) -> None:
    dtype = torch.float32 if weights == "master" else torch.bfloat16
    folder, report = export(case.checkpoint, dtype="keep", weights=weights, prompt_format="none")
    written = load_file(folder / "model.safetensors")
    assert written.keys() == case.truth.keys() - case.facts["tied"].keys() - report["tensors"]["tied"].keys()
    for name, value in written.items():
        assert torch.equal(value, case.truth[name].to(dtype)), name


def test_a_layer_of_another_step_is_found_without_being_asked(tmp_path: Path, export: Export) -> None:
    checkpoint = PLAIN.copy(tmp_path)
    edit(checkpoint / "global_step4" / "layer_03-model_states.pt", lambda state: state["weight"].mul_(2))
    with pytest.raises(ExportError, match=r"model\.norm\.weight"):
        export(checkpoint, prompt_format="none")


def test_a_missing_layer_is_missing_from_the_model(tmp_path: Path, export: Export) -> None:
    checkpoint = PLAIN.copy(tmp_path)
    (checkpoint / "global_step4" / "layer_04-model_states.pt").unlink()
    with pytest.raises(ExportError):
        export(checkpoint, prompt_format="none")


def test_missing_files_of_all_layers_are_named(tmp_path: Path) -> None:
    checkpoint = PLAIN.copy(tmp_path)
    for path in checkpoint.glob("*/layer_*"):
        path.unlink()
    with pytest.raises(IncompleteCheckpointError, match="of a pipeline, and has no layer_"):
        open_checkpoint(checkpoint)


def test_a_missing_stage_is_named(tmp_path: Path) -> None:
    checkpoint = PLAIN.copy(tmp_path)
    for path in checkpoint.glob("*/*mp_rank_01*"):
        path.unlink()
    with pytest.raises(IncompleteCheckpointError, match="model-parallel ranks"):
        open_checkpoint(checkpoint)


def test_layers_cut_by_tensor_parallelism_are_refused(tmp_path: Path) -> None:
    checkpoint = PLAIN.copy(tmp_path)
    layer = checkpoint / "global_step4" / "layer_00-model_states.pt"
    layer.rename(layer.with_name("layer_00-model_00-model_states.pt"))
    with pytest.raises(RefusedError, match="a slice of a layer"):
        open_checkpoint(checkpoint)


def test_a_layer_file_that_was_another_layers_is_found(tmp_path: Path) -> None:
    checkpoint = PLAIN.copy(tmp_path)
    folder = checkpoint / "global_step4"
    (folder / "layer_02-model_states.pt").write_bytes((folder / "layer_01-model_states.pt").read_bytes())
    with pytest.raises(CheckpointError, match="was saved as"):
        open_checkpoint(checkpoint)


def test_layers_in_wrappers_and_with_several_modules_are_named(tmp_path: Path) -> None:
    model = architecture(num_hidden_layers=1)
    block = {
        name.removeprefix("model.layers.0."): list(shape)
        for name, shape in model.memory.items()
        if name.startswith("model.layers.0.")
    }
    layers = tensors(
        _0={"embed_tokens.weight": [281, 16]},
        _1={f"block.{name}": shape for name, shape in block.items()},
        _2={"norm.weight": [16], "lm_head.weight": [281, 16]},
    )
    names = name_layers(model, layers)
    assert list(names.values()) == list(model.memory)
    assert all(place.endswith(name.partition(".")[2].removeprefix("block.")) for name, place in names.items())


@pytest.mark.parametrize(
    "layers",
    [
        {"_0": {"weight": [281, 16]}, "_1": {"attention.dense.weight": [16, 16]}},
        {"_0": {"weight": [281, 8]}},
        {"_0": {"first.weight": [281, 16], "second.weight": [16]}},
    ],
    ids=["other names", "another shape", "names of the wrapper's own"],
)
def test_layers_that_the_class_does_not_have_are_refused(layers: dict[str, dict[str, list[int]]]) -> None:
    with pytest.raises(RefusedError, match="are not the modules of LlamaForCausalLM"):
        name_layers(architecture(), tensors(**layers))


def test_modules_that_could_be_exchanged_are_refused() -> None:
    config = {"model_type": "bloom", "architectures": ["BloomForCausalLM"], "vocab_size": 32, "hidden_size": 16}
    model = ask_architecture({**config, "n_layer": 1, "n_head": 2}, {}, trust_remote_code=False)
    norm = {"weight": [16], "bias": [16]}
    prefix = "transformer.h.0."
    block = {name.removeprefix(prefix): list(shape) for name, shape in model.memory.items() if name.startswith(prefix)}
    with pytest.raises(RefusedError, match=r"word_embeddings_layernorm and transformer\.ln_f"):
        name_layers(model, tensors(_0={"weight": [32, 16]}, _1=norm, _2=block, _3=norm))
