"""An adapter's tensors matched with its base's, by name, and the merged tensors that come of it.

Names: ``peft/utils/save_and_load.py`` and ``peft/tuners/lora`` of PEFT 0.21. They are those in memory after
``base_model.model.``: a module's ``lora_A.weight`` and ``lora_B.weight``, or ``lora_embedding_A`` and ``_B``, its
``lora_magnitude_vector`` (DoRA), ``lora_B.bias``, or ``token_adapter.trainable_tokens_delta``. Any other tensor was
saved whole (``modules_to_save``, ``bias``, a resized embedding) and takes the place of the base's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from exporter.checkpoints.lora import BiasTensor, LoraTensor, TokensTensor
from exporter.errors import CheckpointError, RefusedError
from exporter.tensors import LazyTensor, is_same

MERGE_ELSEWHERE = "Merge it with PEFT (merge_and_unload, then save_pretrained), and export the result."

_PREFIX = "base_model.model."
_WRAPPERS = re.compile(r"\.(base_layer|modules_to_save)(?=\.)")
"""What PEFT puts before the parameters of a module that it wraps."""

_ORIGINAL = ".original_module."
"""What PEFT puts before the base's own parameters where it trains a copy; they are saved with a resized embedding."""

_TOKENS = "token_adapter.trainable_tokens_delta"
_LINEAR = frozenset(["lora_A.weight", "lora_B.weight"])
_EMBEDDING = frozenset(["lora_embedding_A", "lora_embedding_B"])
_BIAS, _MAGNITUDE = "lora_B.bias", "lora_magnitude_vector"
_FACTOR = re.compile(
    rf"(?P<module>.+)\.(?P<role>{'|'.join(map(re.escape, [*_LINEAR, *_EMBEDDING, _BIAS, _MAGNITUDE, _TOKENS]))})"
)
_COMPLETE = {
    frozenset([_TOKENS]),
    *(pair | {*more} for pair in (_LINEAR, _EMBEDDING) for more in ([], [_MAGNITUDE])),
    *(_LINEAR | {_BIAS, *more} for more in ([], [_MAGNITUDE])),
}
"""What a module may have together."""

_OFTEN_TIED = ("lm_head", "embed_out")
"""Heads that a base's files lack where they are its embedding."""


@dataclass(frozen=True)
class Merge:
    """An adapter and its base, all in the base's names.

    ``factors`` are the adapter's tensors by module and role, ``whole`` those that were saved whole; ``modules`` maps a
    module of ``factors`` to its name in memory, which patterns in the adapter's ``config`` are for.
    """

    config: Mapping[str, Any]
    base: Mapping[str, LazyTensor]
    factors: Mapping[str, Mapping[str, LazyTensor]]
    whole: Mapping[str, LazyTensor]
    modules: Mapping[str, str]

    @classmethod
    def of(cls, config: Mapping[str, Any], adapter: Mapping[str, LazyTensor], base: Mapping[str, LazyTensor]) -> Merge:
        """The tensors of ``adapter`` sorted out."""
        factors: dict[str, dict[str, LazyTensor]] = {}
        whole: dict[str, LazyTensor] = {}
        for name, tensor in adapter.items():
            bare = name.removeprefix(_PREFIX)
            if _ORIGINAL in bare:
                continue
            match = _FACTOR.fullmatch(bare)
            place, key = (factors.setdefault(match["module"], {}), match["role"]) if match else (whole, "")
            key = key or _WRAPPERS.sub("", bare)
            if not is_same(tensor, place.setdefault(key, tensor)):
                _mismatch(name, "and another value of it under another name")
        rename = _renaming([*whole, *map(_weight, factors)], base)
        modules = {rename(f"{module}.").removesuffix("."): module for module in factors}
        return cls(
            config,
            base,
            {module: factors[name] for module, name in modules.items()},
            {rename(name): tensor for name, tensor in whole.items()},
            modules,
        )

    @property
    def modules_with_factors(self) -> list[str]:
        """The names in memory of the modules that have a pair of factors, and not only tokens trained alone."""
        return [self.modules[module] for module, roles in self.factors.items() if roles.keys() != {_TOKENS}]

    def tensors(self) -> dict[str, LazyTensor]:
        """Every tensor of the merged model.

        Raises:
            CheckpointError: a tensor of the adapter matches none of the base's.
            RefusedError: what it matches is no tensor that can be merged into.
        """
        for name, tensor in self.whole.items():
            _require_place(name, tensor, self.base.get(name))
        merged = {**self.base, **self.whole}
        for module in self.factors:
            self._require_complete(module)
        for module in self.factors:
            merged |= dict(self._merged(module, merged))
        return merged

    def _require_complete(self, module: str) -> None:
        roles = self.factors[module]
        if frozenset(roles) not in _COMPLETE:
            raise CheckpointError(
                f"The adapter has {' and '.join(sorted(roles))} of {module}, and not all that belongs together.",
                "Copy the adapter again.",
            )
        if _TOKENS not in roles:
            a, b = self._pair(module)
            if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or not a.numel:
                _mismatch(f"{module}.lora_A", f"of shape {list(a.shape)}, beside a lora_B of {list(b.shape)}")

    def _merged(self, module: str, tensors: Mapping[str, LazyTensor]) -> Iterator[tuple[str, LazyTensor]]:
        """Name and value of each tensor that the module's factors change."""
        roles, weight = self.factors[module], _require_matrix(module, tensors.get(_weight(module)))
        if _TOKENS in roles:
            yield _weight(module), TokensTensor(weight, roles[_TOKENS], self._indices(module, weight, roles[_TOKENS]))
            return
        yield _weight(module), self._lora(module, weight)
        if _BIAS in roles:
            bias = tensors.get(f"{module}.bias")
            if bias is None or bias.shape != roles[_BIAS].shape:
                _mismatch(f"{module}.{_BIAS}", "and the base model has no such bias")
            yield f"{module}.bias", BiasTensor(bias, roles[_BIAS], self._scaling(module))

    def _lora(self, module: str, weight: LazyTensor) -> LoraTensor:
        a, b = self._pair(module)
        magnitude = self.factors[module].get(_MAGNITUDE)
        shape, transposed = (b.shape[0], a.shape[1]), self._is_transposed(module)
        if weight.shape != (shape[::-1] if transposed else shape):
            _mismatch(f"{module}.lora_A", f"for a weight of {list(shape)}, and the base's is {list(weight.shape)}")
        if bool(self.config.get("use_dora")) != (magnitude is not None):
            raise CheckpointError(
                f"{module} has {'no' if magnitude is None else 'a'} {_MAGNITUDE}, against use_dora in the config.",
                "Copy config and weights of one save.",
            )
        if magnitude is not None and magnitude.shape != shape[:1]:
            _mismatch(f"{module}.{_MAGNITUDE}", f"of shape {list(magnitude.shape)}, for {shape[0]} outputs")
        return LoraTensor(weight, a, b, self._scaling(module), transposed, magnitude)

    def _pair(self, module: str) -> tuple[LazyTensor, LazyTensor]:
        """A [rank, inputs] and B [outputs, rank] of a module."""
        roles = self.factors[module]
        a, b = (roles[role] for role in sorted(_EMBEDDING if roles.keys() >= _EMBEDDING else _LINEAR))
        return a, b

    def _is_transposed(self, module: str) -> bool:
        """Whether the weight is [inputs, outputs]: its shape says so, or where it is square, the config.

        PEFT asks the layer's class (Conv1D), and writes what it found last into the config.

        Raises:
            RefusedError: the weight is square and others of this adapter are not as the config says.
        """
        if self.factors[module].keys() >= _EMBEDDING:
            return True
        by_shape = self._is_transposed_by_shape(module)
        if by_shape is not None:
            return by_shape
        flag = bool(self.config.get("fan_in_fan_out"))
        others = (name for name, roles in self.factors.items() if roles.keys() >= _LINEAR)
        if any(self._is_transposed_by_shape(other) is (not flag) for other in others):
            raise RefusedError(
                f"Nothing says whether {_weight(module)} is transposed: it is square, and fan_in_fan_out in the "
                "adapter's config is not true of all its modules.",
                MERGE_ELSEWHERE,
            )
        return flag

    def _is_transposed_by_shape(self, module: str) -> bool | None:
        """Whether the weight is [inputs, outputs]; None where its shape does not say."""
        a, b = self._pair(module)
        shape, weight = (b.shape[0], a.shape[1]), self.whole.get(_weight(module), self.base.get(_weight(module)))
        return None if weight is None or shape == shape[::-1] else weight.shape == shape[::-1]

    def _scaling(self, module: str) -> float:
        rank = self._pair(module)[0].shape[0]
        configured = self._setting("r", "rank_pattern", module)
        if configured != rank:
            raise CheckpointError(
                f"{module} has factors of rank {rank}, and the adapter's config says {configured}.",
                "Copy config and weights of one save.",
            )
        alpha = self._setting("lora_alpha", "alpha_pattern", module)
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    def _setting(self, name: str, patterns: str, module: str) -> float:
        """The number that ``name`` is for ``module``: the first pattern's that matches the end of its name."""
        by_pattern = self.config.get(patterns) or {}
        try:
            keys = (key for key in by_pattern if re.match(rf"(.*\.)?({key})$", self.modules[module]))
            value = next((by_pattern[key] for key in keys), self.config.get(name))
        except (re.error, TypeError, OverflowError, RecursionError) as error:
            raise CheckpointError(f"adapter_config.json: {patterns} is broken.", "Copy it again.") from error
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not -1e300 < value < 1e300:
            raise CheckpointError(f"adapter_config.json: {name} is {value!r:.50} for {module}.", "Copy it again.")
        return value

    def _indices(self, module: str, weight: LazyTensor, rows: LazyTensor) -> tuple[int, ...]:
        """The rows of ``weight`` that were trained alone."""
        listed = self.config.get("trainable_token_indices")
        if isinstance(listed, dict):
            names = (name for name in listed if f".{self.modules[module]}".endswith(f".{name}"))
            listed = listed.get(next(names, ""))
        there = range(weight.shape[0])
        if not isinstance(listed, list) or not all(type(index) is int and index in there for index in listed):
            raise CheckpointError(
                f"adapter_config.json: trainable_token_indices names no rows of {module}.", "Copy it again."
            )
        if rows.shape != (len(listed), weight.shape[1]) or len(set(listed)) < len(listed):
            _mismatch(f"{module}.{_TOKENS}", f"of shape {list(rows.shape)}, for {len(listed)} tokens")
        return tuple(listed)


def _weight(module: str) -> str:
    return f"{module}.weight"


def _require_place(name: str, tensor: LazyTensor, place: LazyTensor | None) -> None:
    """A tensor that was saved whole takes the place of one that differs in the rows at most; a head may have none."""
    if place is None and not name.endswith(tuple(map(_weight, _OFTEN_TIED))):
        _mismatch(name, "which the base model does not have")
    if place is not None and (place.shape[1:] != tensor.shape[1:] or len(place.shape) != len(tensor.shape)):
        _mismatch(name, f"of shape {list(tensor.shape)}, and the base's is {list(place.shape)}")


def _require_matrix(module: str, weight: LazyTensor | None) -> LazyTensor:
    if weight is None and module.endswith(_OFTEN_TIED):
        raise RefusedError(
            f"The adapter changes {module}, which the base model has only tied to its embedding.", MERGE_ELSEWHERE
        )
    if weight is None:
        _mismatch(_weight(module), "which the base model does not have")
    if not weight.dtype.is_floating or len(weight.shape) != 2:
        raise RefusedError(
            f"{_weight(module)} is {weight.dtype.value} {list(weight.shape)}: only a floating-point matrix is merged.",
            MERGE_ELSEWHERE,
        )
    return weight


def _mismatch(name: str, reason: str) -> NoReturn:
    raise CheckpointError(
        f"The adapter has {name}, {reason}.", "Name the model that the adapter was trained onto with --base_model."
    )


@dataclass(frozen=True)
class _Renaming:
    """Puts or removes what stands before all names."""

    remove: str = ""
    add: str = ""

    def __call__(self, name: str) -> str:
        return self.add + name.removeprefix(self.remove)


def _renaming(names: Iterable[str], base: Mapping[str, LazyTensor]) -> _Renaming:
    """How the adapter's ``names`` become the base's.

    Files of a base model without its head (``h.0.…`` of GPT-2) lack the prefix of names in memory
    (``transformer.h.0.…``), and an adapter that was trained without the head lacks it too.
    """
    names = list(names)
    removals = [_Renaming(remove=first) for first in _first_parts(names)]
    additions = [_Renaming(add=first) for first in _first_parts(base)]
    return max([_Renaming(), *removals, *additions], key=lambda rename: sum(rename(name) in base for name in names))


def _first_parts(names: Iterable[str]) -> dict[str, None]:
    return dict.fromkeys(f"{name.partition('.')[0]}." for name in names)
