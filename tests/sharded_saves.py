"""Saves of torch.distributed.checkpoint by two or four ranks; the tests run it: ``sharded_saves.py FOLDER RANKS``.

Each save lies in a folder of its own, with the live model's full state dict beside it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module


def make_model() -> nn.Module:
    """Sizes that two ranks do not share evenly, one row for two ranks, bf16, an integer scalar, three dimensions."""
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 1), nn.Linear(1, 3).to(torch.bfloat16))
    model.register_parameter("cube", nn.Parameter(torch.randn(3, 4, 5)))
    model.register_parameter("gain", nn.Parameter(torch.randn(2)))
    model.register_buffer("count", torch.tensor(12))
    return model


def trained(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def save(folder: Path, name: str, state: dict[str, Any], truth: dict[str, Any]) -> None:
    dcp.save(state, checkpoint_id=folder / name)
    if dist.get_rank() == 0:
        torch.save(truth, folder / f"{name}.truth")


def full(model: nn.Module) -> dict[str, Any]:
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return {name: tensor.clone() for name, tensor in get_model_state_dict(model, options=options).items()}


def save_fsdp2(folder: Path) -> None:
    model = make_model()
    for layer in model.children():
        fully_shard(layer)
    fully_shard(model)
    optimizer = trained(model)
    truth = full(model)
    save(folder, "fsdp2", {"model": model.state_dict()}, truth)
    app = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}
    save(folder, "fsdp2-app", {"app": app, "step": torch.tensor(3)}, truth)


def save_fsdp1(folder: Path) -> None:
    model = FullyShardedDataParallel(
        nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)), device_id=torch.device("cpu"), use_orig_params=True
    )
    trained(model)
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT):
        truth = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.SHARDED_STATE_DICT):
        save(folder, "fsdp1", {"state_dict": model.state_dict()}, truth)


def save_columns(folder: Path) -> None:
    """Tensors cut in every dimension but the first that they have, and whole ones that both ranks have."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    truth = {name: tensor.detach() for name, tensor in make_model().state_dict().items()}
    state = {}
    for name, tensor in truth.items():
        last = tensor.ndim - 1
        state[name] = distribute_tensor(tensor, mesh, [Shard(last) if last > 0 else Replicate()])
    state["middle"] = distribute_tensor(truth["cube"], mesh, [Shard(1)])
    save(folder, "columns", state, truth | {"middle": truth["cube"]})


def save_two_dimensions(folder: Path) -> None:
    """FSDP2 within replicas, FSDP2 of tensor-parallel layers, and a save in which every rank describes its own part."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    truth = {name: tensor.clone() for name, tensor in make_pair().state_dict().items()}
    replicated = fully_shard(make_pair(), mesh=mesh)
    save(folder, "hsdp", {"model": replicated.state_dict()}, truth)
    parallel = parallelize_module(make_pair(), mesh["tensor"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(parallel, mesh=mesh["data"])
    save(folder, "fsdp-tp", {"model": parallel.state_dict()}, truth)
    dcp.save({"model": replicated.state_dict()}, checkpoint_id=folder / "apart", use_collectives=False)


def make_pair() -> nn.Sequential:
    torch.manual_seed(8)
    return nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 5))


SAVES = {2: (save_fsdp2, save_fsdp1, save_columns), 4: (save_two_dimensions,)}


def write(rank: int, folder: Path, ranks: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    for write_one in SAVES[ranks]:
        write_one(folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    place, number = Path(sys.argv[1]), int(sys.argv[2])
    torch.multiprocessing.start_processes(write, (place, number), nprocs=number, start_method="fork")
