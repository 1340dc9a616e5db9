"""DeepSpeed folders: ZeRO stages 1, 2 and 3 from their partitions, and model states without optimizer shards.

Where the layout comes from: DeepSpeed 0.19.8 (``deepspeed/utils/zero_to_fp32.py``, ``runtime/zero/stage_1_and_2.py``,
``runtime/zero/stage3.py``), checked against the weights of live engines. Neither deepspeed nor its classes are needed.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from exporter.checkpoints.checkpoint import Checkpoint
from exporter.checkpoints.copies import find_copy
from exporter.checkpoints.folder import is_name, regular_size
from exporter.checkpoints.pretrained import is_pretrained, read_pretrained
from exporter.checkpoints.stage0 import has_masters, name_masters
from exporter.checkpoints.torch_file import Stub, TorchFile, are_sizes, is_state_dict, read_torch_file
from exporter.errors import CheckpointError, IncompleteCheckpointError, RefusedError, UsageError
from exporter.tensors import DType, Extent, LazyTensor, SourceFiles, StoredTensor, Vector

SAVE_AGAIN = "Load it with the trainer that wrote it, write the model with save_pretrained, and export that."
"""What to do with a checkpoint that cannot be exported."""

_MODEL_STATES = re.compile(r"(?:zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<mp>\d+)_model_states\.pt")
_OPTIMIZER_SHARD = re.compile(r"(?:[a-z0-9]+_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<mp>\d+)_optim_states\.pt")
_NAMELESS = "The fp32 master weights have no names and do not fit the model one by one: its own copy is exported."
_FACTS_OF_A_SAVE = ("global_steps", "ds_version", "dp_world_size", "mp_world_size")


def is_zero(folder: Path) -> bool:
    """Whether ``folder`` is where ``engine.save_checkpoint`` wrote."""
    return (folder / "latest").exists() or bool(list_tags(folder))


def is_tag(folder: Path) -> bool:
    """Whether ``folder`` is a tag's: where ``engine.save_checkpoint`` wrote the model states."""
    return any(folder.glob("*model_states.pt"))


def open_zero(folder: Path, tag: str | None) -> Checkpoint:
    """The weights of ``tag``, or of the tag that ``latest`` names.

    Raises:
        CheckpointError: a file is missing, damaged, from another rank, step or run, or unsafe to read.
        RefusedError: the checkpoint is of a kind that cannot be exported.
        UsageError: there is no such tag.
    """
    name, notes = choose_tag(folder, tag)
    whole = _read_whole(folder, name)
    checkpoint = whole.checkpoint("zero" if whole.shards else "zero16", whole.model(), whole.master())
    if checkpoint.model is None and checkpoint.master is None:
        raise IncompleteCheckpointError(
            f"{name} holds ZeRO-3 model states but no optimizer shard, so no weights.",
            "Copy the *_optim_states.pt files of every rank beside them.",
        )
    return replace(checkpoint, notes=(*notes, *checkpoint.notes))


def _read_whole(folder: Path, tag: str) -> Slice:
    """The files of a tag that is neither tensor-parallel nor keeps its weights in files of layers or experts.

    Raises:
        RefusedError: it is, or does.
    """
    whole, *others = read_slices(folder, tag)
    state = whole.states[0].value
    if others or state["module"] is None or state.get("num_experts"):
        raise RefusedError(
            f"The weights of {tag} lie in tensor-parallel slices, a pipeline's layers or experts, which cannot be put "
            "together from these files.",
            "Name the checkpoint that the training wrote, with the files of every rank, layer and expert.",
        )
    return whole


@dataclass(frozen=True)
class Slice:
    """What one model-parallel rank has of a tag: the files of its data-parallel ranks, in their order.

    Without model parallelism that is all there is.
    """

    folder: Path
    tag: str
    states: Sequence[_StateFile]
    shards: Sequence[_StateFile]

    def model(self) -> Mapping[str, LazyTensor] | None:
        """The copy of the weights that the engine trained with, by name."""
        return _model_weights(self.folder, self.states)

    def master(self) -> Mapping[str, LazyTensor] | None:
        """The fp32 weights by name, of the partitions or, without ZeRO, of the model states; None where there are none.

        None also where nothing tells the names of those in the model states.
        """
        if self.shards:
            return _master_weights(self.states, self.shards)
        return _stage0_masters(self.states[0], self.model() or {})

    def checkpoint(
        self, format_name: str, model: Mapping[str, LazyTensor] | None, master: Mapping[str, LazyTensor] | None
    ) -> Checkpoint:
        """The checkpoint of these weights, with the facts that the files tell."""
        first = self.states[0]
        config = first.value.get("ds_config")
        nameless = master is None and has_masters(first.value.get("optimizer"))
        return Checkpoint(
            format=format_name,
            folder=self.folder,
            model=model,
            master=master,
            aliases=_aliases(first),
            zero_stage=_stage(self.shards[0]) if self.shards else 0,
            world_size=len(self.shards) or first.count("dp_world_size") or 1,
            tag=self.tag,
            step=first.count("global_steps"),
            deepspeed_config=config if isinstance(config, dict) else None,
            notes=(_NAMELESS,) if nameless else (),
            is_trained_alone=_is_trained_alone(first),
        )


def read_slices(folder: Path, tag: str) -> list[Slice]:
    """The files of every model-parallel rank, which are whole and of one save.

    Raises:
        CheckpointError: a file is missing, damaged, from another rank, step or run, or unsafe to read.
    """
    matches = (_MODEL_STATES.fullmatch(entry.name) for entry in (folder / tag).iterdir())
    count = 1 + max((int(match["mp"]) for match in matches if match), default=0)
    slices = [_read_slice(folder, tag, rank) for rank in range(count)]
    _check_agreement([part.states[0] for part in slices], _FACTS_OF_A_SAVE)
    for part in slices:
        wanted = part.states[0].count("mp_world_size") or 1
        if wanted != count:
            raise IncompleteCheckpointError(
                f"{part.states[0].name} is of one of {wanted} model-parallel ranks, the files of {count} are there.",
                "Copy the files of every rank of this save, and no others.",
            )
        if len(part.shards) != len(slices[0].shards):
            raise IncompleteCheckpointError(
                f"{part.states[0].name} comes with {len(part.shards)} optimizer shards, {slices[0].states[0].name} "
                f"with {len(slices[0].shards)}.",
                "Copy the *_optim_states.pt files of every rank.",
            )
    _check_one_save([shard for part in slices for shard in part.shards])
    return slices


def _read_slice(folder: Path, tag: str, mp_rank: int) -> Slice:
    files = _list_files(folder / tag, mp_rank)
    states = _read_ranks(files.model_states)
    _check_agreement(states, (*_FACTS_OF_A_SAVE, "param_shapes", "frozen_param_shapes"))
    shards = [_read_optimizer_shard(path) for path in files.optimizer_shards]
    if shards:
        _check_shards(states, shards)
        _check_distinct(shards)
    return Slice(folder, tag, states, shards)


def is_universal_tag(folder: Path) -> bool:
    """Whether ``folder`` is where ``ds_to_universal`` wrote: model states beside a folder of one parameter each."""
    return (folder / "zero").is_dir() and is_tag(folder)


def _is_zero_tag(folder: Path) -> bool:
    return is_tag(folder) and not is_universal_tag(folder)


def list_tags(folder: Path, is_kind: Callable[[Path], bool] = _is_zero_tag) -> list[str]:
    """The sub-folders of one kind, oldest step first."""
    tags = [entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.is_symlink() and is_kind(entry)]
    return sorted(tags, key=lambda tag: (_step_of(tag), tag))


def has_file(folder: Path, pattern: re.Pattern[str]) -> bool:
    """Whether a tag in ``folder`` has a file whose whole name matches ``pattern``."""
    return any(pattern.fullmatch(path.name) for tag in list_tags(folder) for path in (folder / tag).iterdir())


def _step_of(tag: str) -> int:
    digits = re.search(r"(\d{1,18})$", tag)
    return int(digits[1]) if digits else -1


def choose_tag(
    folder: Path, wanted: str | None, latest: str = "latest", is_kind: Callable[[Path], bool] = _is_zero_tag
) -> tuple[str, tuple[str, ...]]:
    """The tag to read, of one kind, and notes for the user; the file ``latest`` names it where ``wanted`` does not.

    Raises:
        UsageError: there is no such tag.
        CheckpointError: nothing says which tag is meant.
    """
    tags = list_tags(folder, is_kind)
    if wanted is not None:
        if wanted not in tags:
            raise UsageError(
                f"There is no tag {wanted!r} in the checkpoint.", f"Tags there: {', '.join(tags) or 'none'}."
            )
        return wanted, ()
    if not (folder / latest).exists():
        if len(tags) == 1:
            return tags[0], (f"There is no file {latest}; {tags[0]} is the only tag.",)
        raise IncompleteCheckpointError(
            f"There is no file {latest}, and {len(tags)} tags: {', '.join(tags)}.", "Choose one with --tag."
        )
    tag = _read_latest(folder / latest)
    if tag not in tags:
        raise IncompleteCheckpointError(
            f"{latest} names the tag {tag!r}, but there is no folder of that name with model states.",
            f"Choose one with --tag; tags there: {', '.join(tags) or 'none'}.",
        )
    newer = [other for other in tags if _step_of(other) > _step_of(tag) >= 0]
    return tag, tuple(f"{latest} names {tag}; {other} is newer and is not exported." for other in newer)


def _read_latest(path: Path) -> str:
    if regular_size(path) > 4096:
        raise CheckpointError(f"{path.name} is too long to be the name of a tag.", "Choose a tag with --tag.")
    try:
        tag = path.read_bytes().decode().strip()
    except UnicodeDecodeError:
        tag = ""
    if not tag or not tag.isprintable() or tag in (".", "..") or "/" in tag or "\\" in tag:
        raise CheckpointError(
            f"{path.name} holds {tag!r}, expected the name of a folder beside it.", "Choose one with --tag."
        )
    return tag


@dataclass(frozen=True)
class _Files:
    model_states: list[Path]
    optimizer_shards: list[Path]


def _list_files(folder: Path, mp_rank: int) -> _Files:
    names = sorted(entry.name for entry in folder.iterdir())
    model_states = _by_rank(folder, names, _MODEL_STATES, mp_rank)
    if not model_states:
        raise IncompleteCheckpointError(
            f"{folder.name} holds neither mp_rank_{mp_rank:02d}_model_states.pt nor "
            f"zero_pp_rank_0_mp_rank_{mp_rank:02d}_model_states.pt.",
            "Copy the model states of every rank.",
        )
    return _Files(model_states, _by_rank(folder, names, _OPTIMIZER_SHARD, mp_rank))


def _by_rank(folder: Path, names: Iterable[str], pattern: re.Pattern[str], mp_rank: int) -> list[Path]:
    """The files of a model-parallel rank that match ``pattern``, in the order of data-parallel ranks, without a gap."""
    ranks: dict[int, str] = {}
    for name in names:
        match = pattern.fullmatch(name)
        if match is None or int(match["mp"]) != mp_rank:
            continue
        rank = int(match["rank"] or 0)
        if rank in ranks:
            raise CheckpointError(f"{ranks[rank]} and {name} are both of rank {rank}.", "Remove the one left over.")
        ranks[rank] = name
    for expected, rank in enumerate(sorted(ranks)):
        if rank != expected:
            example = ranks[rank].replace(f"rank_{rank}_", f"rank_{expected}_")
            raise IncompleteCheckpointError(f"{example} is missing.", "Copy the files of every rank.")
    return [folder / ranks[rank] for rank in sorted(ranks)]


@dataclass(frozen=True)
class _StateFile:
    """One rank's file: what it is called, and what it holds or the part of it that counts."""

    name: str
    value: Mapping[str, Any]
    file: TorchFile

    def tensors(self, key: str) -> Mapping[str, LazyTensor]:
        """The mapping from names to tensors at ``key``, empty where there is none."""
        value = self.value.get(key)
        if value is None:
            return {}
        if not is_state_dict(value):
            _unexpected(self.name, f"{key} is not a mapping from names to tensors")
        return value

    def shapes(self, key: str) -> list[dict[str, tuple[int, ...]]]:
        """The ordered mappings from names to shapes at ``key``, one per parameter group."""
        value = self.value.get(key) or []
        groups = [value] if isinstance(value, dict) else value
        if not isinstance(groups, list) or not all(_is_shapes(group) for group in groups):
            _unexpected(self.name, f"{key} is not a list of mappings from names to shapes")
        return groups

    @functools.cached_property
    def trained(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters of all groups, in the order of ``param_shapes``."""
        return {name: shape for group in self.shapes("param_shapes") for name, shape in group.items()}

    def count(self, key: str) -> int | None:
        """The number at ``key``, which a script's own client_state may have replaced by something else."""
        value = self.value.get(key)
        return value if type(value) is int and value >= 0 else None


def _is_shapes(group: Any) -> bool:
    return isinstance(group, dict) and all(is_name(name) and are_sizes(shape) for name, shape in group.items())


def _read_ranks(paths: Sequence[Path]) -> list[_StateFile]:
    """The model states of data-parallel ranks. They are alike, but for pieces of frozen parameters: if there are none,
    a pickle that is the first rank's to the byte is not parsed again."""
    first = _read_model_states(paths[0])
    twin = None if first.value.get("frozen_param_fragments") else first.file
    return [first, *(_read_model_states(path, twin) for path in paths[1:])]


def _read_model_states(path: Path, twin: TorchFile | None = None) -> _StateFile:
    state = read_state_file(path, twin)
    for key in ("module", "param_shapes"):
        if key not in state.value:
            _unexpected(state.name, f"it has no {key}")
    return state


def _read_optimizer_shard(path: Path) -> _StateFile:
    state = read_state_file(path)
    value = state.value.get("optimizer_state_dict")
    if not isinstance(value, dict):
        _unexpected(state.name, "it has no optimizer_state_dict")
    return replace(state, value=value)


def read_state_file(path: Path, twin: TorchFile | None = None) -> _StateFile:
    """What a rank's file holds: a mapping; that of ``twin`` if both have the same pickle.

    Raises:
        CheckpointError: the file is missing or damaged, was saved under another name, or holds something else.
    """
    name = f"{path.parent.name}/{path.name}"
    file = read_torch_file(path, twin)
    if file.root not in ("archive", path.stem):
        raise CheckpointError(
            f"{name} was saved as {file.root}.pt: it is another rank's or another run's file under this name.",
            "Copy the right file from where the training wrote it.",
        )
    if not isinstance(file.value, dict):
        _unexpected(name, "it does not hold a mapping")
    return _StateFile(name, file.value, file)


def _unexpected(name: str, reason: str) -> NoReturn:
    raise CheckpointError(f"{name} is not what DeepSpeed writes: {reason}.", "Copy the file again.")


def _check_agreement(files: Sequence[_StateFile], keys: Sequence[str]) -> None:
    """All ranks' model states are of one step of one run; what was not parsed again is the first file's own value."""
    others = [file for file in files[1:] if file.value is not files[0].value]
    for key in keys:
        for file in others:
            if _ordered(file, key) != _ordered(files[0], key):
                found, expected = (_brief(state.value.get(key)) for state in (file, files[0]))
                raise CheckpointError(
                    f"{file.name} has {key} {found}, {files[0].name} has {expected}: they are not of one save.",
                    "Copy the files of one step of one run.",
                )


def _ordered(file: _StateFile, key: str) -> Any:
    """What is at ``key``; shapes as lists, since parameters lie in the partitions in their order."""
    return [list(group.items()) for group in file.shapes(key)] if key.endswith("shapes") else file.value.get(key)


def _aliases(state: _StateFile) -> dict[str, str]:
    """Tied names, each with the name that is stored: ``shared_params``, and what is one tensor in ``module``.

    DeepSpeed has written ``shared_params`` since 0.8.
    """
    shared = state.value.get("shared_params") or {}
    if not isinstance(shared, dict) or not all(map(is_name, (*shared, *shared.values()))):
        _unexpected(state.name, "shared_params is not a mapping from names to names")
    module, trained = state.tensors("module"), state.trained
    stored = {module[name]: name for name in trained if name in module and module[name].numel}
    same = {name: stored[tensor] for name, tensor in module.items() if name not in trained and tensor in stored}
    return same | shared


def _brief(value: Any) -> str:
    return repr(value) if isinstance(value, (str, int, type(None))) else "of another content"


# Model weights: the copy that the engine trained with


def _model_weights(folder: Path, states: Sequence[_StateFile]) -> Mapping[str, LazyTensor] | None:
    """The model's own copy: ``module``, or for ZeRO-3 the gathered weights beside the tag where there are any."""
    if _is_partitioned(states[0]):
        return read_pretrained(folder) if is_pretrained(folder) else None
    module, shared = states[0].tensors("module"), _aliases(states[0])
    return {name: tensor for name, tensor in module.items() if module.get(shared.get(name, "")) != tensor}


def _is_partitioned(state: _StateFile) -> bool:
    """Whether the ``module`` of ZeRO-3 stands for parameters by empty tensors."""
    module = state.tensors("module")
    return any(module[name].numel == 0 != math.prod(shape) for name, shape in state.trained.items() if name in module)


def _is_trained_alone(state: _StateFile) -> bool:
    """Whether the save holds trained parameters and buffers alone; without ZeRO nothing says which are trained."""
    trained, frozen = state.trained, state.shapes("frozen_param_shapes")
    others = state.tensors("module").keys() - trained.keys() - _buffers(state).keys() - _aliases(state).keys()
    return bool(trained) and not others and not any(frozen)


# A universal checkpoint: what ds_to_universal leaves beside the parameters


@dataclass(frozen=True)
class Converted:
    """A universal tag without its parameters: the checkpoint without masters, the shapes of the parameters that have
    one, the tensors that have none, and of ZeRO-3 rank 0's piece of each parameter."""

    checkpoint: Checkpoint
    trained: Mapping[str, tuple[int, ...]]
    untrained: Mapping[str, LazyTensor]
    pieces: Mapping[str, LazyTensor]


def read_converted(folder: Path, name: str) -> Converted:
    """What the universal tag ``name`` holds besides parameters: model states, and the rest of rank 0's shard.

    Raises:
        CheckpointError: a file is missing, damaged, from another rank, step or run, or unsafe to read.
        RefusedError: the checkpoint is of a kind that cannot be exported.
    """
    whole = _read_whole(folder, name)
    states, trained = whole.states, whole.states[0].trained
    shard = read_state_file(folder / name / "zero" / "optimizer_state.pt")
    stage, ranks = _stage(shard), _partition_count(shard) or len(states)
    if (stage == 3) is not _is_partitioned(states[0]):
        raise CheckpointError(
            f"{shard.name} is of ZeRO-{stage}, the model states are not.", "Convert the checkpoint again."
        )
    if stage == 3 and len(states) != ranks:
        raise IncompleteCheckpointError(
            f"There are the model states of {len(states)} ranks, but {ranks} were converted.",
            "Copy the model states of every rank.",
        )
    if stage == 3:
        untrained = _stage3_frozen(states) | _buffers(states[0])
    else:
        untrained = _untrained(states[0]) | _stage12_frozen(states[0])
    checkpoint = replace(whole.checkpoint("universal", whole.model(), None), zero_stage=stage, world_size=ranks)
    return Converted(checkpoint, trained, untrained, _first_pieces(shard, trained, ranks) if stage == 3 else {})


def _first_pieces(shard: _StateFile, trained: Mapping[str, tuple[int, ...]], ranks: int) -> dict[str, LazyTensor]:
    """The start of each ZeRO-3 parameter, of which ``shard`` is rank 0's."""
    vector = Vector(tuple(extent for part in _partitions(shard, "fp32_flat_groups") for extent in part.extents))
    pieces: dict[str, LazyTensor] = {}
    position = 0
    for name, shape in trained.items():
        numel = math.ceil(math.prod(shape) / ranks)
        pieces[name] = StoredTensor((numel,), _dtype(vector), vector.cut(position, position + numel))
        position += numel
    _check_total([shard], "all parameter groups", vector, position, slack=0)
    return pieces


# Master weights: the fp32 partitions of the optimizer


def _master_weights(states: Sequence[_StateFile], shards: Sequence[_StateFile]) -> dict[str, LazyTensor]:
    if _stage(shards[0]) == 3:
        return _stage3_parameters(states, shards) | _stage3_frozen(states) | _buffers(states[0])
    return _untrained(states[0]) | stage12_parameters(states[0], shards) | _stage12_frozen(states[0])


def _stage0_masters(state: _StateFile, model: Mapping[str, LazyTensor]) -> dict[str, LazyTensor] | None:
    """The masters in model states; None where there are none, or none that fit the copy ``model`` one by one."""
    optimizer = state.value.get("optimizer")
    if not has_masters(optimizer):
        return None
    buffers = _buffers(state)
    masters = name_masters({name: tensor for name, tensor in model.items() if name not in buffers}, optimizer)
    return None if masters is None else masters | buffers


def _buffers(state: _StateFile) -> dict[str, LazyTensor]:
    names = state.value.get("buffer_names") or []
    if not isinstance(names, list) or not all(map(is_name, names)):
        _unexpected(state.name, "buffer_names is not a list of names")
    buffers = set(names)
    return {name: tensor for name, tensor in state.tensors("module").items() if name in buffers}


def _untrained(state: _StateFile) -> dict[str, LazyTensor]:
    """What the optimizer has no part of: buffers, and parameters that are frozen, which stage 1 lists nowhere."""
    others = _aliases(state).keys() | state.trained.keys()
    return {name: tensor for name, tensor in state.tensors("module").items() if name not in others}


def _stage(shard: _StateFile) -> int:
    """``zero_stage`` is a ZeroStageEnum; BF16_Optimizer writes none and partitions as stage 1 does."""
    value = shard.value.get("zero_stage", 1)
    if isinstance(value, Stub) and len(value.args) == 1:
        value = value.args[0]
    if value not in (1, 2, 3):
        _unexpected(shard.name, f"zero_stage is {value!r}, expected 1, 2 or 3")
    return int(value)


def _check_shards(states: Sequence[_StateFile], shards: Sequence[_StateFile]) -> None:
    """The shard of every rank is there, and for ZeRO-3 its model states."""
    for shard in shards:
        world_size = _partition_count(shard) or len(shards)
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


def _check_one_save(shards: Sequence[_StateFile]) -> None:
    """All ranks' optimizer shards are of one step of one run."""
    if not shards:
        return
    first, *others = ((shard, _optimizer_steps(shard)) for shard in shards)
    for shard, steps in others:
        if _stage(shard) != _stage(first[0]) or shard.value.get("ds_version") != first[0].value.get("ds_version"):
            raise CheckpointError(
                f"{shard.name} and {first[0].name} differ in ZeRO stage or DeepSpeed version.",
                "Copy the files of one save.",
            )
        if steps and first[1] and steps != first[1]:
            raise CheckpointError(
                f"{shard.name} is of optimizer step {max(steps)}, {first[0].name} of step {max(first[1])}.",
                "Copy the files of one step of one run.",
            )


def _check_distinct(shards: Sequence[_StateFile]) -> None:
    """No rank's file is a copy of another's."""
    copy = find_copy((shard, _all_extents(shard, _partition_key(shards))) for shard in shards)
    if copy is not None:
        raise CheckpointError(
            f"{copy[0].name} holds the same partitions as {copy[1].name}: one of them is a copy of the other.",
            "Copy the files of every rank again from where the training wrote them.",
        )


def _all_extents(shard: _StateFile, key: str) -> list[Extent]:
    return [extent for part in _partitions(shard, key) for extent in part.extents]


def _partition_key(shards: Sequence[_StateFile]) -> str:
    return "fp32_flat_groups" if _stage(shards[0]) == 3 else "single_partition_of_fp32_groups"


def _partition_count(shard: _StateFile) -> int | None:
    """``partition_count``: a number, or one per parameter group; None where there is none."""
    value = shard.value.get("partition_count")
    counts = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(count) is int and count > 0 for count in counts):
        _unexpected(shard.name, "partition_count is neither a number nor a list of numbers")
    return max(counts, default=None)


def _optimizer_steps(shard: _StateFile) -> set[float]:
    """The step counters of the base optimizer: numbers, or tensors of one element.

    torch counts in the state of each parameter, DeepSpeed's FusedAdam in each parameter group.
    """
    base = shard.value.get("optimizer_state_dict", shard.value.get("base_optimizer_state"))
    state, groups = (base.get("state"), base.get("param_groups")) if isinstance(base, dict) else (None, None)
    entries = [*(state.values() if isinstance(state, dict) else ()), *(groups if isinstance(groups, list) else ())]
    steps = [entry["step"] for entry in entries if isinstance(entry, dict) and "step" in entry]
    with SourceFiles() as files:
        return {
            next(step.blocks(files)).item() if isinstance(step, LazyTensor) else step
            for step in steps
            if isinstance(step, (int, float)) or (isinstance(step, LazyTensor) and step.numel == 1)
        }


def _partitions(shard: _StateFile, key: str) -> list[StoredTensor]:
    value = shard.value.get(key)
    if not isinstance(value, list) or not all(
        isinstance(part, StoredTensor) and len(part.shape) == 1 and part.dtype.is_floating for part in value
    ):
        _unexpected(shard.name, f"{key} is not a list of vectors of floating-point numbers")
    return value


def stage12_parameters(state: _StateFile, shards: Sequence[_StateFile]) -> dict[str, LazyTensor]:
    """Each group's partitions, joined in rank order, are one vector with its parameters one after the other.

    A parameter is followed by its entry of ``param_alignment_paddings`` (elements), where there is that key.
    """
    groups = state.shapes("param_shapes")
    ranks = [_partitions(shard, _partition_key(shards)) for shard in shards]
    paddings = [_paddings(shard, groups) for shard in shards]
    for shard, partitions, own in zip(shards, ranks, paddings, strict=True):
        if len(partitions) != len(groups):
            _unexpected(shard.name, f"it has {len(partitions)} parameter groups, {state.name} has {len(groups)}")
        if own != paddings[0]:
            raise CheckpointError(
                f"{shard.name} and {shards[0].name} differ in param_alignment_paddings.", "Copy the files of one save."
            )
    tensors: dict[str, LazyTensor] = {}
    for index, group in enumerate(groups):
        vector = Vector(tuple(extent for partitions in ranks for extent in partitions[index].extents))
        position = 0
        for (name, shape), padding in zip(group.items(), paddings[0][index], strict=True):
            tensors[name] = StoredTensor(shape, _dtype(vector), vector.cut(position, position + math.prod(shape)))
            position += math.prod(shape) + padding
        _check_total(shards, f"parameter group {index}", vector, position, slack=2 * len(shards))
    return tensors


def _paddings(shard: _StateFile, groups: Sequence[Mapping[str, tuple[int, ...]]]) -> list[list[int]]:
    """``param_alignment_paddings`` in elements, for each parameter of each group; zeros where there is none."""
    paddings = shard.value.get("param_alignment_paddings") or [[0] * len(group) for group in groups]
    if (
        not isinstance(paddings, list)
        or not all(isinstance(group, list) for group in paddings)
        or [len(group) for group in paddings] != [len(group) for group in groups]
        or not all(type(padding) is int and padding >= 0 for group in paddings for padding in group)
    ):
        _unexpected(shard.name, "param_alignment_paddings does not have one number for each of param_shapes")
    return paddings


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


@dataclass(frozen=True)
class _Ranks:
    """Each rank's partitions, joined to one vector: what all ZeRO-3 parameters are pieces of."""

    vectors: tuple[Vector, ...]

    @functools.cached_property
    def paths(self) -> frozenset[Path]:
        return frozenset().union(*(vector.paths for vector in self.vectors))


class PartitionedTensor(StoredTensor):
    """A ZeRO-3 parameter: ceil(numel / ranks) elements in each rank's vector, from ``start`` on; padding comes last.

    Its extents are worked out when they are asked for: a large model on many ranks has millions.
    """

    def __init__(self, shape: tuple[int, ...], dtype: DType, ranks: _Ranks, start: int) -> None:
        for name, value in (("shape", shape), ("dtype", dtype), ("ranks", ranks), ("start", start)):
            object.__setattr__(self, name, value)

    ranks: _Ranks
    start: int

    @property
    def piece(self) -> int:
        """Number of elements in each rank's vector."""
        return math.ceil(self.numel / len(self.ranks.vectors))

    @property
    def paths(self) -> frozenset[Path]:
        return self.ranks.paths

    @property
    def extents(self) -> tuple[Extent, ...]:
        stop = self.start + self.piece
        pieces = tuple(extent for vector in self.ranks.vectors for extent in vector.cut(self.start, stop))
        return Vector(pieces).cut(0, self.numel)


def _stage3_parameters(states: Sequence[_StateFile], shards: Sequence[_StateFile]) -> dict[str, LazyTensor]:
    """A rank's flat groups, joined, hold its pieces of the parameters in the order of ``param_shapes``."""
    ranks = tuple(
        Vector(tuple(extent for part in _partitions(shard, _partition_key(shards)) for extent in part.extents))
        for shard in shards
    )
    tensors: dict[str, LazyTensor] = {}
    joined, position = _Ranks(ranks), 0
    for name, shape in states[0].trained.items():
        tensor = PartitionedTensor(shape, _dtype(ranks[0]), joined, position)
        tensors[name] = tensor
        position += tensor.piece
    for shard, rank in zip(shards, ranks, strict=True):
        _check_total([shard], "all parameter groups", rank, position, slack=0)
        if _dtype(rank) is not _dtype(ranks[0]):
            raise CheckpointError(
                f"{shard.name} holds {_dtype(rank).value} partitions, {shards[0].name} {_dtype(ranks[0]).value} ones.",
                "Copy the files of one save.",
            )
    return tensors


def _stage3_frozen(states: Sequence[_StateFile]) -> dict[str, LazyTensor]:
    """A frozen parameter's pieces lie in the ranks' model states, cut as the trained ones are."""
    ranks = [_frozen(state)[1] for state in states]
    tensors: dict[str, LazyTensor] = {}
    for name, shape in _frozen(states[0])[0].items():
        pieces = [rank[name] for rank in ranks]
        vector = Vector(tuple(e for piece in pieces if isinstance(piece, StoredTensor) for e in piece.extents))
        if not 0 <= vector.numel - math.prod(shape) < len(ranks) or len({part.dtype for part in pieces}) > 1:
            _unexpected(states[0].name, f"the pieces of frozen parameter {name} do not make up its shape {shape}")
        tensors[name] = StoredTensor(shape, _dtype(vector), vector.cut(0, math.prod(shape)))
    return tensors
