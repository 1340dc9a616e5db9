"""DeepSpeed expert-parallel folders: each expert of a mixture has a file, the rest lies as in any other folder.

Where the layout comes from: DeepSpeed 0.19.8 (``deepspeed/runtime/engine.py``: ``_save_moe_checkpoint``;
``deepspeed/utils/groups.py``), checked against the weights of live engines. An expert's file has the expert's number in
its names. Its fp32 master lies in a parameter group with fewer partitions than there are ranks: with n of them for
each of E expert-parallel ranks, the data-parallel ranks r, r + E, r + 2 E, … share the experts of r, which
``param_shapes`` numbers from 0 on every rank.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from exporter.checkpoints.checkpoint import Checkpoint
from exporter.checkpoints.folder import is_name
from exporter.checkpoints.zero import (
    SAVE_AGAIN,
    Slice,
    choose_tag,
    has_file,
    read_slices,
    read_state_file,
    stage12_parameters,
)
from exporter.errors import CheckpointError, IncompleteCheckpointError, RefusedError
from exporter.tensors import LazyTensor

_EXPERT_FILE = re.compile(r"layer_(?P<layer>\d+)_expert_(?P<expert>\d+)_mp_rank_\d+_model_states\.pt")
_EXPERT = re.compile(r"(?P<module>.*\.deepspeed_moe\.experts\.deepspeed_experts)\.(?P<expert>\d+)\.(?P<name>.+)")
_COPY_EXPERTS = "Copy the files of every expert of this save, and no others."


def is_expert_parallel(folder: Path) -> bool:
    """Whether a tag in ``folder`` has files of experts."""
    return has_file(folder, _EXPERT_FILE)


def open_expert_parallel(folder: Path, tag: str | None) -> Checkpoint:
    """The weights of ``tag``, with those of all experts.

    Raises:
        CheckpointError: a file is missing, damaged, from another rank, step or run, or unsafe to read.
        RefusedError: the experts are cut by tensor parallelism, or were put together by AutoEP.
        UsageError: there is no such tag.
    """
    name, notes = choose_tag(folder, tag)
    whole, *others = read_slices(folder, name)
    state = whole.states[0]
    if others or state.value.get("ds_autoep_layers"):
        kind = "tensor-parallel" if others else "written by AutoEP, under other names than the model's"
        raise RefusedError(f"The experts of {name} are {kind}, which cannot be exported.", SAVE_AGAIN)
    model = {**(whole.model() or {}), **_read_experts(folder / name, state.value.get("num_experts"))}
    master = _master_weights(whole, model)
    if master is None:
        notes = (*notes, "The experts have no fp32 master weights: their own copy is all there is, without a step.")
    checkpoint = whole.checkpoint("zero" if master else "zero16", model, master)
    return replace(checkpoint, notes=notes, undated=True)


def _read_experts(folder: Path, counts: Any) -> dict[str, LazyTensor]:
    """The tensors of every expert of every mixture; ``counts`` are the numbers of experts (``num_experts``).

    Raises:
        IncompleteCheckpointError: an expert's file is missing.
        CheckpointError: there is one too many, or one holds another expert.
    """
    if not isinstance(counts, list) or not all(type(count) is int for count in counts):
        raise CheckpointError(f"{folder.name} does not say how many experts it has.", "Copy its model states again.")
    matches = (_EXPERT_FILE.fullmatch(path.name) for path in folder.iterdir())
    there = {(int(match["layer"]), int(match["expert"])): match[0] for match in matches if match}
    wanted = ((layer, expert) for layer, count in enumerate(counts) for expert in range(count))
    if missing := next((place for place in wanted if place not in there), None):
        raise IncompleteCheckpointError(
            f"Expert {missing[1]} of layer {missing[0]} in {folder.name} has no file.", _COPY_EXPERTS
        )
    for layer, expert in sorted(there):
        if layer >= len(counts) or expert >= counts[layer]:
            raise CheckpointError(
                f"Expert {expert} of layer {layer} in {folder.name} has a file too many.", _COPY_EXPERTS
            )
    tensors: dict[str, LazyTensor] = {}
    for layer, expert in sorted(there):
        own = _read_expert(folder / there[layer, expert], expert)
        if not tensors.keys().isdisjoint(own):
            raise CheckpointError(
                f"{there[layer, expert]} holds an expert of another layer.", "Copy it again from where it was written."
            )
        tensors |= own
    return tensors


def _read_expert(path: Path, expert: int) -> Mapping[str, LazyTensor]:
    state = read_state_file(path)
    for name, tensor in state.value.items():
        match = _EXPERT.fullmatch(name) if is_name(name) else None
        if match is None or int(match["expert"]) != expert or not isinstance(tensor, LazyTensor):
            raise CheckpointError(
                f"{state.name} holds {name!r:.200}, expected tensors of expert {expert} alone.", "Copy the file again."
            )
    return state.value


def _master_weights(whole: Slice, model: Mapping[str, LazyTensor]) -> dict[str, LazyTensor] | None:
    """The fp32 masters; the model's own tensors where there is none (buffers, frozen parameters).

    None where there are no optimizer shards of ZeRO, or masters that the model does not have.
    """
    if not whole.shards:
        return None
    masters: dict[str, LazyTensor] = {}
    for group, shapes in enumerate(whole.states[0].shapes("param_shapes")):
        masters |= _group_parameters(whole, group, shapes)
    return {**model, **masters} if masters.keys() <= model.keys() else None


def _group_parameters(whole: Slice, group: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, LazyTensor]:
    """The parameters of one group, of all expert-parallel ranks where it is one of experts."""
    ranks = len(whole.shards)
    counts = whole.shards[0].value.get("partition_count")
    partitions = counts[group] if isinstance(counts, list) and group < len(counts) else ranks
    expert_ranks, rest = divmod(ranks, partitions)
    if rest or (expert_ranks > 1 and not all(map(_EXPERT.fullmatch, shapes))):
        raise CheckpointError(
            f"{whole.shards[0].name} has {partitions} partitions of parameter group {group} on {ranks} ranks.",
            "Copy the files of every rank of one save.",
        )
    state = replace(whole.states[0], value={"param_shapes": [shapes]})
    shards = [replace(shard, value=_only_group(shard.value, group)) for shard in whole.shards]
    parameters: dict[str, LazyTensor] = {}
    for rank in range(expert_ranks):
        own = stage12_parameters(state, shards[rank::expert_ranks])
        parameters |= {_numbered(name, rank, shapes) if expert_ranks > 1 else name: own[name] for name in own}
    return parameters


def _only_group(shard: Mapping[str, Any], group: int) -> dict[str, Any]:
    """An optimizer shard with one of its parameter groups alone."""
    keys = ("single_partition_of_fp32_groups", "param_alignment_paddings")
    lists = {key: shard[key] for key in keys if isinstance(shard.get(key), list)}
    return {"zero_stage": shard.get("zero_stage", 1), **{key: value[group : group + 1] for key, value in lists.items()}}


def _numbered(name: str, rank: int, names: Mapping[str, object]) -> str:
    """The name in the model of what an expert-parallel rank calls ``name``: its first expert is not number 0."""
    matches = {other: match for other in names if (match := _EXPERT.fullmatch(other))}
    own = matches[name]
    local = {match["expert"] for match in matches.values() if match["module"] == own["module"]}
    return f"{own['module']}.{int(own['expert']) + rank * len(local)}.{own['name']}"
