"""The account of a checkpoint's tensors: every one of them written, or not written for a reason that has a name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from exporter.architecture.expectations import Architecture
from exporter.architecture.origin import Origin
from exporter.errors import CheckpointError, RefusedError
from exporter.tensors import Extent, LazyTensor, StoredTensor, Vector

_WRAPPERS = re.compile(r"(?<![^.])_(orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\.")
"""What torch.compile, FSDP and activation checkpointing put before the names of any module."""


@dataclass(frozen=True)
class Account:
    """Every tensor of a checkpoint: written (by its name on disk), tied to one that is, or dropped for a reason.

    ``tied_values`` are the tensors that were found under tied names, with the name on disk that they should equal.
    """

    weights: Mapping[str, LazyTensor]
    tied: Mapping[str, str]
    dropped: Mapping[str, str]
    tied_values: Mapping[str, tuple[LazyTensor, str]]


def account(
    architecture: Architecture,
    tensors: Mapping[str, LazyTensor],
    aliases: Mapping[str, str],
    *,
    is_trained_alone: bool = False,
) -> Account:
    """Match the checkpoint's ``tensors`` with what the architecture expects, name by name and shape by shape.

    Their names may be those in memory or those in files, now or formerly, of this class or of its base model, and
    wrapped. ``aliases`` are the checkpoint's own ties: names that are stored under another. Where the save
    ``is_trained_alone``, what is missing was frozen.

    Raises:
        CheckpointError: a tensor is missing, left over or of another shape.
        RefusedError: a tensor is laid out in its file in a way that it cannot be split in.
    """
    full = dict(tensors) | {alias: tensors[name] for alias, name in aliases.items() if name in tensors}
    best = _best(_Reading.of(architecture, renamed) for renamed in _renamings(architecture, full))
    if is_trained_alone and len(best.missing) == best.faults > 0:
        raise CheckpointError(
            f"Frozen parameters of {architecture.class_name} were left out of the save: {_listed(best.missing)}.",
            "Save the checkpoint with its frozen parameters (exclude_frozen_parameters=False).",
        )
    _require_complete(architecture, best)
    return _settle(architecture, best)


def _renamings(architecture: Architecture, tensors: Mapping[str, LazyTensor]) -> Iterator[dict[str, LazyTensor]]:
    """The tensors under the names that they may mean, likelier ones first."""
    yield dict(tensors)
    if any(_WRAPPERS.search(name) for name in tensors):
        for bare in _renamed(tensors, lambda name: _WRAPPERS.sub("", name)):
            yield from _renamings(architecture, bare)
    if len({name.partition(".")[0] for name in tensors}) == 1 and all("." in name for name in tensors):
        # An attribute that all names begin with is a wrapper's: DDP's module, PEFT's base_model, Lightning's any name.
        yield from _renamings(architecture, {name.partition(".")[2]: tensor for name, tensor in tensors.items()})
    if architecture.base_prefix:
        yield {f"{architecture.base_prefix}.{name}": tensor for name, tensor in tensors.items()}
    yield from _renamed(tensors, architecture.renamed)


def _renamed(tensors: Mapping[str, LazyTensor], rename: Callable[[str], str]) -> Iterator[dict[str, LazyTensor]]:
    """The tensors under new names, unless two of them would have one name, and one be lost."""
    renamed = {rename(name): tensor for name, tensor in tensors.items()}
    if len(renamed) == len(tensors):
        yield renamed


def _best(readings: Iterator[_Reading]) -> _Reading:
    """The first one with the fewest faults; once there is one without any, no more are made."""
    best = next(readings)
    while best.faults and (other := next(readings, None)):
        best = min(best, other, key=lambda reading: reading.faults)
    return best


@dataclass(frozen=True)
class _Reading:
    """The tensors read as names in memory or as names on disk.

    ``found`` are the expected ones, by their names there, ``aliases`` the ones under tied names, with their targets
    there.
    """

    in_memory: bool
    found: Mapping[str, LazyTensor]
    aliases: Mapping[str, tuple[LazyTensor, str]]
    dropped: Mapping[str, str]
    missing: list[str]
    unexpected: list[str]
    misshapen: list[str]

    @property
    def faults(self) -> int:
        return len(self.missing) + len(self.unexpected) + len(self.misshapen)

    @classmethod
    def of(cls, architecture: Architecture, tensors: Mapping[str, LazyTensor]) -> _Reading:
        in_memory = _are_in_memory(architecture, tensors)
        expected = _expected(architecture, in_memory)
        aliases = _aliases(architecture, tensors, in_memory)
        found = {target: tensor for tensor, target in aliases.values() if target in expected}
        found |= {name: tensor for name, tensor in tensors.items() if name in expected}
        rest = [name for name in tensors if name not in expected and name not in aliases]
        reasons = {name: _reason(architecture, name, tensors[name]) for name in rest}
        return cls(
            in_memory=in_memory,
            found=found,
            aliases=aliases,
            dropped={name: reason for name, reason in reasons.items() if reason},
            missing=[name for name in expected if name not in found and not _may_miss(architecture, name, in_memory)],
            unexpected=[name for name, reason in reasons.items() if not reason],
            misshapen=[
                f"{name} {list(tensor.shape)}, expected {list(expected[name])}"
                for name, tensor in found.items()
                if tensor.shape != expected[name]
            ],
        )


def _are_in_memory(architecture: Architecture, names: Iterable[str]) -> bool:
    """Whether more of ``names`` are names in memory than are names on disk."""
    return sum((name in architecture.memory) - (name in architecture.disk) for name in names) > 0


def _expected(architecture: Architecture, in_memory: bool) -> dict[str, tuple[int, ...]]:
    """Name → shape of the tensors that a checkpoint must hold, as in memory or as on disk."""
    if not in_memory:
        return {name: origin.shape for name, origin in architecture.disk.items()}
    return {name: shape for name, shape in architecture.memory.items() if name not in architecture.tied}


def _places(architecture: Architecture) -> dict[str, str]:
    """Name in memory → name on disk, of the tensors that are only renamed."""
    return {
        origin.name: name
        for name, origin in architecture.disk.items()
        if len(origin.pieces) == 1 and origin.shape == architecture.memory[origin.name]
    }


def _aliases(
    architecture: Architecture, tensors: Mapping[str, LazyTensor], in_memory: bool
) -> dict[str, tuple[LazyTensor, str]]:
    """The tensors under tied names, each with the name of its target."""
    if not architecture.tied:
        return {}
    places = {name: name for name in architecture.memory} if in_memory else _places(architecture)
    names = {name: name if name in architecture.tied else architecture.renamed(name) for name in tensors}
    return {
        name: (tensors[name], places[architecture.tied[alias]])
        for name, alias in names.items()
        if architecture.tied.get(alias) in places
    }


def _reason(architecture: Architecture, name: str, tensor: LazyTensor) -> str | None:
    """Why the unexpected tensor ``name`` is not written; None for no reason."""
    if name in architecture.transient and len(architecture.transient[name]) == len(tensor.shape):
        return "non-persistent buffer"
    if _is_derived(name, tensor) or any(re.search(pattern, name) for pattern in architecture.ignored):
        return "not loaded by the architecture"
    return None


def _is_derived(name: str, tensor: LazyTensor) -> bool:
    """Whether ``name`` is a buffer that old versions of the library saved and that every later one computes.

    They are rotary frequencies (a vector), causal masks ([1, 1, n, n]) and the value of what is masked (a scalar).
    """
    if re.search(r"(^|\.)inv_freq$", name):
        return len(tensor.shape) == 1
    if re.search(r"\.attn\.bias$|\.attention\.bias$", name):
        return tensor.shape == (1, 1, *tensor.shape[-1:] * 2)
    return name.endswith(".masked_bias") and tensor.numel == 1


def _may_miss(architecture: Architecture, name: str, in_memory: bool) -> bool:
    memory_name = name if in_memory else architecture.disk[name].name
    return any(re.search(pattern, memory_name) for pattern in architecture.optional)


def _require_complete(architecture: Architecture, reading: _Reading) -> None:
    kinds = (("missing", reading.missing), ("unexpected", reading.unexpected), ("of another shape", reading.misshapen))
    faults = [f"{len(names)} {kind} ({_listed(names)})" for kind, names in kinds if names]
    if faults:
        raise CheckpointError(
            f"The weights are not those of {architecture.class_name}: {'; '.join(faults)}.",
            "Check that config.json belongs to these weights and that the checkpoint is whole.",
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _settle(architecture: Architecture, reading: _Reading) -> Account:
    """The account of a reading without faults, in names on disk and in the model's order."""
    places = _places(architecture)
    values = {
        name: (tensor, places[target] if reading.in_memory else target)
        for name, (tensor, target) in reading.aliases.items()
    }
    tied = {name: target for name, (_, target) in values.items()}
    for alias, target in architecture.tied.items():
        tied.setdefault(alias, places[target])
    return Account(
        weights=dict(_weights(architecture, reading)),
        tied=tied,
        dropped={**reading.dropped, **{name: f"tied to {target}" for name, (_, target) in values.items()}},
        tied_values=values,
    )


def _weights(architecture: Architecture, reading: _Reading) -> Iterator[tuple[str, LazyTensor]]:
    for name, origin in architecture.disk.items():
        if not reading.in_memory:
            if name in reading.found:
                yield name, reading.found[name]
        elif all(piece.name in reading.found for piece in origin.pieces):
            yield name, _from_memory(architecture, name, origin, reading.found)


def _from_memory(
    architecture: Architecture, name: str, origin: Origin, tensors: Mapping[str, LazyTensor]
) -> LazyTensor:
    """The tensor ``name`` on disk, of the tensors in memory: itself, or extents of them; nothing is read."""
    whole = tensors[origin.name]
    if len(origin.pieces) == 1 and origin.shape == architecture.memory[origin.name]:
        return whole
    extents: list[Extent] = []
    for piece in origin.pieces:
        tensor = tensors[piece.name]
        if not isinstance(tensor, StoredTensor) or tensor.dtype is not whole.dtype:
            raise RefusedError(
                f"{piece.name} ({tensor.dtype.value}) is not laid out so that {name} can be taken from it exactly.",
                "Save the model again with save_pretrained, and export that.",
            )
        extents += Vector(tensor.extents).cut(piece.start, piece.start + piece.numel)
    return StoredTensor(origin.shape, whole.dtype, tuple(extents))
