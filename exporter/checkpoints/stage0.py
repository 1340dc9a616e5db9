"""DeepSpeed without ZeRO: the fp32 master weights of its 16-bit optimizers, which have no names.

Where the layout comes from: DeepSpeed 0.19.8, ``runtime/fp16/unfused_optimizer.py`` (``fp32_groups``: per parameter
group a list of tensors) and ``runtime/fp16/fused_optimizer.py`` (``fp32_groups_flat``: per group one vector without
padding). Both keep a group's parameters in the order in which they were given, which is the module's as a rule.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from exporter.checksums import check_members
from exporter.tensors import DType, LazyTensor, StoredTensor, Vector, start_alike

Shape = tuple[int, ...]


def has_masters(optimizer: Any) -> TypeGuard[dict[str, Any]]:
    """Whether ``optimizer``, the state of one in the model states, holds masters."""
    return isinstance(optimizer, dict) and any(optimizer.get(key) for key in ("fp32_groups", "fp32_groups_flat"))


def name_masters(parameters: Mapping[str, LazyTensor], optimizer: Mapping[str, Any]) -> dict[str, LazyTensor] | None:
    """The masters by the names of ``parameters``, the model's own copy in its order; None where they do not fit.

    A group's masters come in the order of the parameters. Each must have its parameter's shape and, cast, the bits that
    the copy starts with; no other group's next master may fit as well; and none may be left over.

    Raises:
        CheckpointError: they do not fit because they are damaged.
    """
    groups = _groups(optimizer)
    masters = _match(parameters, groups)
    if masters is None:
        members = {extent.member for group in groups for extent in group.vector.extents}
        check_members({member: () for member in members if member is not None and member.crc32 is not None})
    return masters


def _match(parameters: Mapping[str, LazyTensor], groups: Sequence[_Group]) -> dict[str, LazyTensor] | None:
    masters: dict[str, LazyTensor] = {}
    seen: dict[LazyTensor, str] = {}
    for name, copy in parameters.items():
        if (first := seen.setdefault(copy, name)) != name:
            masters[name] = masters[first]
            continue
        fitting = [group for group in groups if group.fits(copy)]
        if len(fitting) != 1:
            return None
        masters[name] = fitting[0].take(copy.shape)
    return masters if groups and all(group.is_empty for group in groups) else None


@dataclass
class _Group:
    """A parameter group's masters, joined: those up to element ``position`` have their names.

    ``shapes`` maps the first element of each master to its shape; it is None where only their order is known.
    """

    vector: Vector
    shapes: Mapping[int, Shape] | None
    position: int = 0

    @property
    def is_empty(self) -> bool:
        return self.position == self.vector.numel

    def fits(self, copy: LazyTensor) -> bool:
        """Whether the next master can be that of ``copy``."""
        if self.shapes is not None and self.shapes.get(self.position) != copy.shape:
            return False
        return self.position + copy.numel <= self.vector.numel and start_alike(self._next(copy.shape), copy)

    def take(self, shape: Shape) -> StoredTensor:
        """The next master, which has a name now."""
        master = self._next(shape)
        self.position += master.numel
        return master

    def _next(self, shape: Shape) -> StoredTensor:
        return StoredTensor(shape, DType.F32, self.vector.cut(self.position, self.position + math.prod(shape)))


def _groups(optimizer: Mapping[str, Any]) -> list[_Group]:
    """The groups of either layout; none where they are not what DeepSpeed writes."""
    flat, lists = optimizer.get("fp32_groups_flat"), optimizer.get("fp32_groups")
    if _are_masters(flat):
        return [_group([tensor], None) for tensor in flat]
    if isinstance(lists, list) and all(map(_are_masters, lists)):
        return [_group(group, _shapes(group)) for group in lists]
    return []


def _are_masters(value: Any) -> TypeGuard[list[StoredTensor]]:
    return isinstance(value, list) and all(
        isinstance(tensor, StoredTensor) and tensor.dtype is DType.F32 for tensor in value
    )


def _group(tensors: Iterable[StoredTensor], shapes: Mapping[int, Shape] | None) -> _Group:
    return _Group(Vector(tuple(extent for tensor in tensors for extent in tensor.extents)), shapes)


def _shapes(tensors: Sequence[StoredTensor]) -> dict[int, Shape]:
    starts = itertools.accumulate((tensor.numel for tensor in tensors), initial=0)
    return {start: tensor.shape for start, tensor in zip(starts, tensors, strict=False)}
