"""DeepSpeed ZeRO folders: stages 1, 2 and 3 from their partitions, and model states without optimizer shards.

Where the layout comes from: DeepSpeed 0.19.8 (``deepspeed/utils/zero_to_fp32.py``, ``runtime/zero/stage_1_and_2.py``,
``runtime/zero/stage3.py``), checked against the weights of live engines. Neither deepspeed nor its classes are needed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from exporter.checkpoints.checkpoint import Checkpoint
from exporter.checkpoints.folder import regular_size
from exporter.checkpoints.pretrained import is_pretrained, read_pretrained
from exporter.checkpoints.torch_file import Stub, read_torch_file
from exporter.errors import CheckpointError, IncompleteCheckpointError, RefusedError, UsageError
from exporter.tensors import DType, Extent, LazyTensor, SourceFiles, StoredTensor, Vector

_MODEL_STATES = re.compile(r"(?:zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<mp>\d+)_model_states\.pt")
_OPTIMIZER_SHARD = re.compile(r"(?:[a-z0-9]+_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<mp>\d+)_optim_states\.pt")
_UNSUPPORTED = (
    (re.compile(r"layer_\d+-model(_\d+-model)?_states\.pt"), "a pipeline-parallel checkpoint"),
    (re.compile(r".*expert_\d+_mp_rank_\d+_\w+_states\.pt"), "an expert-parallel checkpoint"),
)


def is_zero(folder: Path) -> bool:
    """Whether ``folder`` is where ``engine.save_checkpoint`` wrote."""
    return (folder / "latest").exists() or bool(_tags(folder))


def open_zero(folder: Path, tag: str | None) -> Checkpoint:
    """The weights of ``tag``, or of the tag that ``latest`` names.

    Raises:
        CheckpointError: a file is missing, damaged, from another rank, step or run, or unsafe to read.
        RefusedError: the checkpoint is of a kind that cannot be exported.
        UsageError: there is no such tag.
    """
    name, notes = _choose_tag(folder, tag)
    files = _list_files(folder / name)
    states = [_read_model_states(path) for path in files.model_states]
    _check_agreement(states)
    shards = [_read_optimizer_shard(path) for path in files.optimizer_shards]
    first = states[0].value
    checkpoint = Checkpoint(
        format="zero" if shards else "zero16",
        folder=folder,
        model=_model_weights(folder, states),
        master=_master_weights(states, shards) if shards else None,
        aliases=dict(first.get("shared_params") or {}),
        zero_stage=_stage(shards[0]) if shards else 0,
        world_size=len(shards) or int(first.get("dp_world_size") or 1),
        tag=name,
        step=first.get("global_steps"),
        deepspeed_config=_plain_mapping(first.get("ds_config")),
        notes=notes,
    )
    if checkpoint.model is None and checkpoint.master is None:
        raise IncompleteCheckpointError(
            f"{name} holds ZeRO-3 model states but no optimizer shard, so no weights.",
            "Copy the *_optim_states.pt files of every rank beside them.",
        )
    return checkpoint


def _tags(folder: Path) -> list[str]:
    """The sub-folders that hold model states, oldest step first."""
    tags = [
        entry.name
        for entry in folder.iterdir()
        if entry.is_dir() and not entry.is_symlink() and any(entry.glob("*model_states.pt"))
    ]
    return sorted(tags, key=lambda tag: (_step_of(tag), tag))


def _step_of(tag: str) -> int:
    digits = re.search(r"(\d{1,18})$", tag)
    return int(digits[1]) if digits else -1


def _choose_tag(folder: Path, wanted: str | None) -> tuple[str, tuple[str, ...]]:
    """The tag to read, and notes for the user."""
    tags = _tags(folder)
    if wanted is not None:
        if wanted not in tags:
            raise UsageError(
                f"There is no tag {wanted!r} in the checkpoint.", f"Tags there: {', '.join(tags) or 'none'}."
            )
        return wanted, ()
    if not (folder / "latest").exists():
        if len(tags) == 1:
            return tags[0], (f"There is no file latest; {tags[0]} is the only tag.",)
        raise IncompleteCheckpointError(
            f"There is no file latest, and {len(tags)} tags: {', '.join(tags)}.", "Choose one with --tag."
        )
    tag = _read_latest(folder / "latest")
    if tag not in tags:
        raise IncompleteCheckpointError(
            f"latest names the tag {tag!r}, but there is no folder of that name with model states.",
            f"Choose one with --tag; tags there: {', '.join(tags) or 'none'}.",
        )
    newer = [other for other in tags if _step_of(other) > _step_of(tag)]
    return tag, tuple(f"latest names {tag}; {other} is newer and is not exported." for other in newer)


def _read_latest(path: Path) -> str:
    if regular_size(path) > 4096:
        raise CheckpointError("latest is too long to be the name of a tag.", "Choose a tag with --tag.")
    try:
        tag = path.read_bytes().decode().strip()
    except UnicodeDecodeError:
        tag = ""
    if not tag or not tag.isprintable() or tag in (".", "..") or "/" in tag or "\\" in tag:
        raise CheckpointError(
            f"latest holds {tag!r}, expected the name of a folder beside it.", "Choose one with --tag."
        )
    return tag


@dataclass(frozen=True)
class _Files:
    model_states: list[Path]
    optimizer_shards: list[Path]


def _list_files(folder: Path) -> _Files:
    names = sorted(entry.name for entry in folder.iterdir())
    for pattern, kind in _UNSUPPORTED:
        found = [name for name in names if pattern.fullmatch(name)]
        if found:
            raise RefusedError(
                f"{found[0]} belongs to {kind}, which cannot be exported.", "Gather it with its trainer."
            )
    model_states = _by_rank(folder, names, _MODEL_STATES)
    return _Files(model_states, _by_rank(folder, names, _OPTIMIZER_SHARD))


def _by_rank(folder: Path, names: Iterable[str], pattern: re.Pattern[str]) -> list[Path]:
    """The files that match ``pattern``, in rank order, without a gap."""
    ranks: dict[int, str] = {}
    for name in names:
        match = pattern.fullmatch(name)
        if match is None:
            continue
        if int(match["mp"]) > 0:
            raise RefusedError(
                f"{name} belongs to a tensor-parallel checkpoint, which cannot be exported.",
                "Gather it with its trainer.",
            )
        rank = int(match["rank"] or 0)
        if rank in ranks:
            raise CheckpointError(f"{ranks[rank]} and {name} are both of rank {rank}.", "Remove the one left over.")
        ranks[rank] = name
    missing = sorted(set(range(max(ranks, default=-1) + 1)) - set(ranks))
    if missing:
        example = ranks[max(ranks)].replace(f"rank_{max(ranks)}_", f"rank_{missing[0]}_")
        raise IncompleteCheckpointError(f"{example} is missing.", "Copy the files of every rank.")
    return [folder / ranks[rank] for rank in sorted(ranks)]


@dataclass(frozen=True)
class _StateFile:
    """One rank's file: what it is called and what it holds."""

    name: str
    value: Mapping[str, Any]

    def tensors(self, key: str) -> Mapping[str, LazyTensor]:
        """The mapping from names to tensors at ``key``, empty where there is none."""
        value = self.value.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict) or not all(isinstance(tensor, LazyTensor) for tensor in value.values()):
            _unexpected(self.name, f"{key} is not a mapping from names to tensors")
        return value

    def shapes(self, key: str) -> list[dict[str, tuple[int, ...]]]:
        """The ordered mappings from names to shapes at ``key``, one per parameter group."""
        value = self.value.get(key) or []
        groups = [value] if isinstance(value, dict) else value
        if not isinstance(groups, list) or not all(_is_shapes(group) for group in groups):
            _unexpected(self.name, f"{key} is not a list of mappings from names to shapes")
        return groups


def _is_shapes(group: Any) -> bool:
    return isinstance(group, dict) and all(
        isinstance(name, str) and isinstance(shape, tuple) and all(type(size) is int and size >= 0 for size in shape)
        for name, shape in group.items()
    )


def _read_model_states(path: Path) -> _StateFile:
    state = _read_state_file(path)
    for key in ("module", "param_shapes"):
        if key not in state.value:
            _unexpected(state.name, f"it has no {key}")
    if state.value["module"] is None:
        raise RefusedError(
            f"{state.name} has no module: the layers of a pipeline lie elsewhere.", "Gather it with its trainer."
        )
    if int(state.value.get("mp_world_size") or 1) > 1:
        raise RefusedError(f"{state.name} belongs to a tensor-parallel checkpoint.", "Gather it with its trainer.")
    return state


def _read_optimizer_shard(path: Path) -> _StateFile:
    state = _read_state_file(path)
    value = state.value.get("optimizer_state_dict")
    if not isinstance(value, dict):
        _unexpected(state.name, "it has no optimizer_state_dict")
    return _StateFile(state.name, value)


def _read_state_file(path: Path) -> _StateFile:
    name = f"{path.parent.name}/{path.name}"
    file = read_torch_file(path)
    if file.root not in ("archive", path.stem):
        raise CheckpointError(
            f"{name} was saved as {file.root}.pt: it is another rank's or another run's file under this name.",
            "Copy the right file from where the training wrote it.",
        )
    if not isinstance(file.value, dict):
        _unexpected(name, "it does not hold a mapping")
    return _StateFile(name, file.value)


def _unexpected(name: str, reason: str) -> NoReturn:
    raise CheckpointError(f"{name} is not what DeepSpeed writes: {reason}.", "Copy the file again.")


def _check_agreement(files: Sequence[_StateFile]) -> None:
    """All ranks' model states are of one step of one run."""
    for key in ("global_steps", "ds_version", "dp_world_size", "param_shapes", "frozen_param_shapes"):
        for file in files[1:]:
            if file.value.get(key) != files[0].value.get(key):
                found, expected = (_brief(state.value.get(key)) for state in (file, files[0]))
                raise CheckpointError(
                    f"{file.name} has {key} {found}, {files[0].name} has {expected}: they are not of one save.",
                    "Copy the files of one step of one run.",
                )


def _brief(value: Any) -> str:
    return repr(value) if isinstance(value, (str, int, type(None))) else "of another content"


def _plain_mapping(value: Any) -> Mapping[str, Any] | None:
    return value if isinstance(value, dict) else None


# Model weights: the copy that the engine trained with


def _model_weights(folder: Path, states: Sequence[_StateFile]) -> Mapping[str, LazyTensor] | None:
    """The model's own copy: ``module``, or for ZeRO-3 the gathered weights beside the tag where there are any."""
    module = states[0].tensors("module")
    shared = states[0].value.get("shared_params") or {}
    partitioned = {name for group in states[0].shapes("param_shapes") for name in group}
    if any(module[name].numel == 0 for name in partitioned & module.keys()):
        return read_pretrained(folder) if is_pretrained(folder) else None
    return {name: tensor for name, tensor in module.items() if module.get(shared.get(name, "")) != tensor}


# Master weights: the fp32 partitions of the optimizer


def _master_weights(states: Sequence[_StateFile], shards: Sequence[_StateFile]) -> dict[str, LazyTensor]:
    _check_shards(states, shards)
    buffers = set(states[0].value.get("buffer_names") or ())
    kept = {name: tensor for name, tensor in states[0].tensors("module").items() if name in buffers}
    if _stage(shards[0]) == 3:
        return _stage3_parameters(states, shards) | _stage3_frozen(states) | kept
    return _stage12_parameters(states[0], shards) | _stage12_frozen(states[0]) | kept


def _stage(shard: _StateFile) -> int:
    """``zero_stage`` is a ZeroStageEnum; BF16_Optimizer writes none and partitions as stage 1 does."""
    value = shard.value.get("zero_stage", 1)
    if isinstance(value, Stub) and len(value.args) == 1:
        value = value.args[0]
    if value not in (1, 2, 3):
        _unexpected(shard.name, f"zero_stage is {value!r}, expected 1, 2 or 3")
    return int(value)


def _check_shards(states: Sequence[_StateFile], shards: Sequence[_StateFile]) -> None:
    """Every rank is there, and all are of one step."""
    for shard in shards:
        count = shard.value.get("partition_count", len(shards))
        world_size = max(count) if isinstance(count, list) else count
        if world_size != len(shards):
            kind = IncompleteCheckpointError if world_size > len(shards) else CheckpointError
            raise kind(
                f"{shard.name} is one of {world_size} partitions, but {len(shards)} files are there.",
                "Copy the *_optim_states.pt files of every rank of this save, and no others.",
            )
    if _stage(shards[0]) == 3 and len(states) != len(shards):
        raise IncompleteCheckpointError(
            f"There are {len(shards)} ranks' optimizer shards but {len(states)} ranks' model states.",
            "Copy the files of every rank.",
        )
    first, *others = ((shard, _optimizer_steps(shard)) for shard in shards)
    for shard, steps in others:
        for key in ("zero_stage", "ds_version"):
            if shard.value.get(key) != first[0].value.get(key):
                raise CheckpointError(
                    f"{shard.name} and {first[0].name} differ in {key}.", "Copy the files of one save."
                )
        if steps and first[1] and steps != first[1]:
            raise CheckpointError(
                f"{shard.name} is of optimizer step {max(steps)}, {first[0].name} of step {max(first[1])}.",
                "Copy the files of one step of one run.",
            )


def _optimizer_steps(shard: _StateFile) -> set[float]:
    """The step counters in the base optimizer's state: numbers, or tensors of one element."""
    base = shard.value.get("optimizer_state_dict", shard.value.get("base_optimizer_state"))
    state = base.get("state") if isinstance(base, dict) else None
    entries = state.values() if isinstance(state, dict) else ()
    steps = {entry["step"] for entry in entries if isinstance(entry, dict) and "step" in entry}
    with SourceFiles() as files:
        return {
            float(next(step.blocks(files)).item()) if isinstance(step, LazyTensor) else float(step)
            for step in steps
            if isinstance(step, (int, float)) or (isinstance(step, LazyTensor) and step.numel == 1)
        }


def _partitions(shard: _StateFile, key: str) -> list[StoredTensor]:
    value = shard.value.get(key)
    if not isinstance(value, list) or not all(
        isinstance(part, StoredTensor) and len(part.shape) == 1 for part in value
    ):
        _unexpected(shard.name, f"{key} is not a list of vectors")
    return value


def _stage12_parameters(state: _StateFile, shards: Sequence[_StateFile]) -> dict[str, LazyTensor]:
    """Each group's partitions, joined in rank order, are one vector with its parameters one after the other.

    A parameter is followed by its entry of ``param_alignment_paddings`` (elements), where there is that key.
    """
    groups = state.shapes("param_shapes")
    ranks = [_partitions(shard, "single_partition_of_fp32_groups") for shard in shards]
    paddings = shards[0].value.get("param_alignment_paddings") or [[0] * len(group) for group in groups]
    for shard, partitions in zip(shards, ranks, strict=True):
        if not len(partitions) == len(groups) == len(paddings):
            _unexpected(shard.name, f"it has {len(partitions)} parameter groups, {state.name} has {len(groups)}")
    tensors: dict[str, LazyTensor] = {}
    for index, group in enumerate(groups):
        if len(paddings[index]) != len(group):
            _unexpected(
                shards[0].name, f"parameter group {index} has {len(paddings[index])} paddings, not {len(group)}"
            )
        vector = Vector(tuple(extent for partitions in ranks for extent in partitions[index].extents))
        position = 0
        for (name, shape), padding in zip(group.items(), paddings[index], strict=True):
            tensors[name] = StoredTensor(shape, _dtype(vector), vector.cut(position, position + math.prod(shape)))
            position += math.prod(shape) + padding
        _check_total(shards, f"parameter group {index}", vector, position, slack=2 * len(shards))
    return tensors


def _dtype(vector: Vector) -> DType:
    return vector.extents[0].dtype if vector.extents else DType.F32


def _check_total(shards: Sequence[_StateFile], what: str, vector: Vector, wanted: int, slack: int) -> None:
    """The joined partitions hold the parameters, and no more than the alignment padding of DeepSpeed besides."""
    if not 0 <= vector.numel - wanted < max(slack, 1) or len({extent.dtype for extent in vector.extents}) > 1:
        raise CheckpointError(
            f"The partitions of {what} in {shards[0].name} to {shards[-1].name} hold {vector.numel} elements, "
            f"the model states describe {wanted}.",
            "Copy the files of every rank of one save.",
        )


def _stage12_frozen(state: _StateFile) -> dict[str, LazyTensor]:
    shapes, fragments = _frozen(state)
    for name, shape in shapes.items():
        if fragments[name].shape != shape:
            _unexpected(state.name, f"frozen parameter {name} has shape {fragments[name].shape}, expected {shape}")
    return {name: fragments[name] for name in shapes}


def _frozen(state: _StateFile) -> tuple[dict[str, tuple[int, ...]], Mapping[str, LazyTensor]]:
    shapes = {name: shape for group in state.shapes("frozen_param_shapes") for name, shape in group.items()}
    fragments = state.tensors("frozen_param_fragments")
    for name in shapes:
        if name not in fragments:
            raise CheckpointError(
                f"{state.name} lacks the frozen parameter {name}: frozen parameters were excluded from the save.",
                "Save the checkpoint with its frozen parameters (exclude_frozen_parameters=False).",
            )
    return shapes, fragments


class PartitionedTensor(StoredTensor):
    """A ZeRO-3 parameter: ceil(numel / ranks) elements in each rank's vector, from ``start`` on; padding comes last.

    Its extents are worked out when they are asked for: a large model on many ranks has millions.
    """

    def __init__(self, shape: tuple[int, ...], dtype: DType, ranks: tuple[Vector, ...], start: int) -> None:
        for name, value in (("shape", shape), ("dtype", dtype), ("ranks", ranks), ("start", start)):
            object.__setattr__(self, name, value)

    ranks: tuple[Vector, ...]
    start: int

    @property
    def piece(self) -> int:
        """Number of elements in each rank's vector."""
        return math.ceil(self.numel / len(self.ranks))

    @property
    def extents(self) -> tuple[Extent, ...]:
        pieces = tuple(extent for rank in self.ranks for extent in rank.cut(self.start, self.start + self.piece))
        return Vector(pieces).cut(0, self.numel)


def _stage3_parameters(states: Sequence[_StateFile], shards: Sequence[_StateFile]) -> dict[str, LazyTensor]:
    """A rank's flat groups, joined, hold its pieces of the parameters in the order of ``param_shapes``."""
    shapes = {name: shape for group in states[0].shapes("param_shapes") for name, shape in group.items()}
    ranks = tuple(
        Vector(tuple(extent for part in _partitions(shard, "fp32_flat_groups") for extent in part.extents))
        for shard in shards
    )
    tensors: dict[str, LazyTensor] = {}
    position = 0
    for name, shape in shapes.items():
        tensor = PartitionedTensor(shape, _dtype(ranks[0]), ranks, position)
        tensors[name] = tensor
        position += tensor.piece
    for shard, rank in zip(shards, ranks, strict=True):
        _check_total([shard], "all parameter groups", rank, position, slack=0)
    return tensors


def _stage3_frozen(states: Sequence[_StateFile]) -> dict[str, LazyTensor]:
    """A frozen parameter's pieces lie in the ranks' model states, cut as the trained ones are."""
    ranks = [_frozen(state)[1] for state in states]
    tensors: dict[str, LazyTensor] = {}
    for name, shape in _frozen(states[0])[0].items():
        pieces = [rank[name] for rank in ranks]
        vector = Vector(tuple(e for piece in pieces if isinstance(piece, StoredTensor) for e in piece.extents))
        if not 0 <= vector.numel - math.prod(shape) < max(len(ranks), 1):
            _unexpected(states[0].name, f"the pieces of frozen parameter {name} do not make up its shape {shape}")
        tensors[name] = StoredTensor(shape, _dtype(vector), vector.cut(0, math.prod(shape)))
    return tensors
