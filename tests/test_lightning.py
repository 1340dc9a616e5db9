"""Weights whose names a wrapper prefixed: Lightning's checkpoints, torch.compile's and DDP's state dicts."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from exporter.checkpoints import open_checkpoint
from exporter.errors import CheckpointError, UsageError
from tests.conftest import Case

Export = Callable[..., tuple[Path, dict[str, Any]]]
BASE = Case("llama-safetensors")
ZERO_CASES = [Case("tiny-zero2-aligned-roundrobin"), Case("tiny-zero3-init"), Case("llama-tied-zero2")]


def small_files(folder: Path, case: Case = BASE) -> Path:
    """A folder with the config and tokenizer that the trainer left elsewhere."""
    folder.mkdir(exist_ok=True)
    for path in case.checkpoint.iterdir():
        if path.suffix in (".json", ".jinja") and not path.name.startswith("model."):
            shutil.copy(path, folder)
    return folder


def live_model() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(BASE.checkpoint)


def module(attribute: str, model: Any) -> torch.nn.Module:
    """A LightningModule is a module that holds the model as an attribute."""
    holder = torch.nn.Module()
    setattr(holder, attribute, model)
    return holder


def lightning_checkpoint(holder: torch.nn.Module) -> dict[str, Any]:
    """What Lightning 2.5 writes (``dump_checkpoint``), after one step of training."""
    optimizer = torch.optim.AdamW(holder.parameters(), lr=1e-3)
    sum(parameter.sum() for parameter in holder.parameters()).backward()
    optimizer.step()
    return {
        "epoch": 0,
        "global_step": 12,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": holder.state_dict(),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 1}}}},
        "callbacks": {
            "ModelCheckpoint{'monitor': None}": {"best_model_path": "/home/me/a.ckpt", "kth_value": torch.ones(1)}
        },
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [],
        "hparams_name": "args",
        "hyper_parameters": argparse.Namespace(lr=1e-3, folder=Path("data")),
    }


def assert_equals(folder: Path, model: Any) -> None:
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("attribute", ["model", "module", "net", "compiled"])
def test_a_checkpoint_of_lightnings_gives_the_models_weights(attribute: str, tmp_path: Path, export: Export) -> None:
    model = live_model()
    holder = module(attribute, torch.compile(model) if attribute == "compiled" else model)
    torch.save(lightning_checkpoint(holder), small_files(tmp_path / "run") / "epoch=0-step=12.ckpt")
    folder, report = export(tmp_path / "run", dtype="fp32", prompt_format="none")
    assert (report["checkpoint"]["format"], report["checkpoint"]["step"]) == ("pretrained", 12)
    assert_equals(folder, model)


def test_a_metric_beside_the_model_is_not_taken_for_a_weight(tmp_path: Path, export: Export) -> None:
    holder = module("model", live_model())
    holder.register_buffer("seen", torch.zeros(1))
    torch.save(lightning_checkpoint(holder), small_files(tmp_path / "run") / "last.ckpt")
    with pytest.raises(CheckpointError, match="unexpected"):
        export(tmp_path / "run")


def test_several_checkpoints_are_named(tmp_path: Path) -> None:
    for name in ("last.ckpt", "epoch=0.ckpt"):
        torch.save({"state_dict": {}}, small_files(tmp_path / "run") / name)
    with pytest.raises(CheckpointError, match=r"There are 2 checkpoints of Lightning: epoch=0\.ckpt, last\.ckpt"):
        open_checkpoint(tmp_path / "run")


@pytest.mark.parametrize("value", [{"state_dict": None}, [1], {"state_dict": {"a": 1}}, {"weights": {}}])
def test_what_has_no_state_dict_is_no_checkpoint_of_lightnings(value: Any, tmp_path: Path) -> None:
    torch.save(value, small_files(tmp_path / "run") / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"last\.ckpt has no state_dict"):
        open_checkpoint(tmp_path / "run")


def test_it_has_no_tags(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, small_files(tmp_path / "run") / "last.ckpt")
    with pytest.raises(UsageError, match="There is no tag"):
        open_checkpoint(tmp_path / "run", "global_step1")


# torch.compile and DistributedDataParallel


@pytest.fixture(scope="module")
def ddp() -> Iterator[Callable[[Any], torch.nn.Module]]:
    """Wraps a model for data-parallel training, in a group of this process alone."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.nn.parallel.DistributedDataParallel
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("compiled", ["not", "inside", "outside", "each layer"])
@pytest.mark.parametrize("is_parallel", [True, False])
def test_the_prefixes_of_wrappers_are_taken_off(
    file: str, compiled: str, is_parallel: bool, ddp: Any, tmp_path: Path, export: Export
) -> None:
    model = live_model()
    wrapped: Any = torch.compile(model) if compiled == "inside" else model
    if compiled == "each layer":
        model.model.layers = torch.nn.ModuleList(map(torch.compile, model.model.layers))
    wrapped = ddp(wrapped) if is_parallel else wrapped
    wrapped = torch.compile(wrapped) if compiled == "outside" else wrapped
    path = small_files(tmp_path / "run") / file
    (save_file if file.endswith("safetensors") else torch.save)(wrapped.state_dict(), path)
    folder, _ = export(tmp_path / "run", dtype="fp32", prompt_format="none")
    assert_equals(folder, live_model())


# Lightning's DeepSpeed strategy


def prefixed(value: Any, prefix: str) -> Any:
    """A rank's file with the names that the engine has where the module that it trains holds the model."""
    names = ("module", "shared_params", "frozen_param_shapes", "frozen_param_fragments")
    for key in names:
        if value.get(key):
            value[key] = type(value[key])((f"{prefix}{name}", item) for name, item in value[key].items())
    value["shared_params"] = {alias: f"{prefix}{name}" for alias, name in value["shared_params"].items()}
    value["buffer_names"] = [f"{prefix}{name}" for name in value["buffer_names"]]
    value["param_shapes"] = [
        type(group)((f"{prefix}{n}", s) for n, s in group.items()) for group in value["param_shapes"]
    ]
    return value


@pytest.mark.parametrize("prefix", ["_forward_module.model.", "module.model.", "model."])
@pytest.mark.parametrize("case", ZERO_CASES, ids=lambda case: case.name)
def test_a_folder_of_its_deepspeed_strategy_gives_the_models_weights(
    case: Case, prefix: str, tmp_path: Path, export: Export
) -> None:
    """The engine's own checkpoint, under the names and in the place that the strategy gives it."""
    tag = case.facts["tag"]
    checkpoint = small_files(tmp_path / "last.ckpt", case)
    shutil.copytree(case.checkpoint / tag, checkpoint / "checkpoint")
    (checkpoint / "latest").write_text("checkpoint")
    for path in (checkpoint / "checkpoint").glob("*model_states.pt"):
        state = torch.load(path, weights_only=False)
        state |= {"pytorch-lightning_version": "2.5.0", "epoch": 0, "hyper_parameters": argparse.Namespace(lr=1)}
        torch.save(prefixed(state, prefix), path)
    folder, report = export(checkpoint, dtype="fp32", prompt_format="none")
    assert (report["checkpoint"]["format"], report["checkpoint"]["tag"]) == ("zero", "checkpoint")
    state = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in case.truth.items())
