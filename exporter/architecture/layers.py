"""The names of a pipeline's layers: which modules of the model they are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from exporter.architecture.expectations import Architecture
from exporter.errors import RefusedError
from exporter.tensors import LazyTensor

_Shapes = Mapping[str, tuple[int, ...]]
_HINT = "Load it with the trainer that wrote it, write the model with save_pretrained, and export that."


def name_layers(architecture: Architecture, tensors: Mapping[str, LazyTensor]) -> dict[str, str]:
    """``<layer>.<name within it>`` → name in the model, for each of ``tensors``, which are in the layers' order.

    A pipeline runs its layers in the order of their numbers, and a model has its modules in the order in which they
    run. So the layers must be the model's modules one after the other: a layer's names and shapes are those of one
    module, or of some with the names that they have in the model. There is at most one such assignment. Where two
    modules could be exchanged by their names and shapes, they must be blocks of one list, or one of them the input
    embedding, which comes first.

    Raises:
        RefusedError: there is no such assignment, or two modules could be exchanged.
    """
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in tensors.items():
        layer, _, within = name.partition(".")
        layers.setdefault(layer, {})[within] = tensor.shape
    on_disk = {name: origin.shape for name, origin in architecture.disk.items()}
    modules = _assign(layers, architecture.memory) or _assign(layers, on_disk)
    if not modules:
        raise RefusedError(
            f"The pipeline's {len(layers)} layers are not the modules of {architecture.class_name} by names and "
            "shapes, and nothing else says which weight of the model a layer's tensor is.",
            _HINT,
        )
    _require_distinct(architecture, modules)
    return {f"{module.layer}.{within}": name for module in modules for within, name in module.names.items()}


@dataclass(frozen=True)
class _Module:
    """A module of the model in a layer: ``names`` has the name in the model of each name within the layer."""

    layer: str
    prefix: str
    names: Mapping[str, str]
    shapes: frozenset[tuple[str, tuple[int, ...]]]
    """By the name within the module."""


def _assign(layers: Mapping[str, _Shapes], expected: _Shapes) -> list[_Module] | None:
    """The modules of all layers, which are next to one another in the order of ``expected``."""
    modules: list[_Module] = []
    position = 0
    for layer, shapes in layers.items():
        found = _modules(layer, shapes, dict(list(expected.items())[position : position + len(shapes)]))
        if found is None:
            return None
        modules += found
        position += len(shapes)
    return modules


def _modules(layer: str, shapes: _Shapes, wanted: _Shapes) -> list[_Module] | None:
    """The layer as one module, perhaps in a wrapper, or as several, each with its own name in the model."""
    for depth in range(_common_depth(shapes) + 1):
        whole = _module(layer, shapes, wanted, depth)
        if whole is not None:
            return [whole]
    children: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        children.setdefault(name.partition(".")[0], {})[name] = shape
    modules, position = [], 0
    for part in children.values():
        module = _module(layer, part, dict(list(wanted.items())[position : position + len(part)]), depth=0)
        if module is None:
            return None
        modules.append(module)
        position += len(part)
    return modules


def _common_depth(names: Mapping[str, object]) -> int:
    """How many components all names begin with, and have others after."""
    paths = [name.split(".")[:-1] for name in names]
    unequal = (depth for depth, parts in enumerate(zip(*paths, strict=False)) if len(set(parts)) > 1)
    return next(unequal, min(map(len, paths), default=0))


def _module(layer: str, shapes: _Shapes, wanted: _Shapes, depth: int) -> _Module | None:
    """The module whose tensors, all of ``wanted``, have these shapes, without ``depth`` components of their names."""
    within = {name: ".".join(name.split(".")[depth:]) for name in shapes}
    if depth and not any("." in rest for rest in within.values()):
        return None  # What is left of the names ("weight") tells nothing, and the wrapper's own name contradicts.
    for prefix in _prefixes(next(iter(wanted), ""), within.values()):
        names = {name: prefix + rest for name, rest in within.items()}
        if {names[name]: shape for name, shape in shapes.items()} == dict(wanted):
            return _Module(layer, prefix, names, frozenset((within[name], shape) for name, shape in shapes.items()))
    return None


def _prefixes(name: str, endings: Iterable[str]) -> Iterator[str]:
    """What stands before an ending of ``name``, for those of ``endings`` that are one."""
    for ending in endings:
        if name == ending or name.endswith("." + ending):
            yield name[: len(name) - len(ending)]


def _require_distinct(architecture: Architecture, modules: list[_Module]) -> None:
    """No two modules could be exchanged, but for blocks of one list, whose order is that of their numbers."""
    kinds: dict[frozenset[tuple[str, tuple[int, ...]]], dict[str, _Module]] = {}
    for index, module in enumerate(modules):
        if index == 0 and architecture.input_embedding in module.names.values():
            continue
        alike = kinds.setdefault(module.shapes, {})
        alike.setdefault(re.sub(r"\d+", "#", module.prefix), module)
        if len(alike) > 1:
            first, second = (other.prefix.rstrip(".") for other in alike.values())
            raise RefusedError(
                f"Layers of the pipeline fit {first} and {second} of {architecture.class_name} both: by names and "
                "shapes they could be exchanged.",
                _HINT,
            )
