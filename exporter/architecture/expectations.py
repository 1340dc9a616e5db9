"""What a model class expects of the files that it is loaded from."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from exporter.architecture.model import build_model, own_class
from exporter.architecture.origin import Origin, disk_origins
from exporter.tensors import DType

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Architecture:
    """The model class's expectations; names are those in files unless said otherwise.

    ``memory`` are the shapes of the state dict by their names in memory, ``transient`` those of buffers that are
    never saved. ``disk`` maps each name in a file to its origin in memory, in the model's order. ``tied`` maps an
    alias to the name that is stored, both as in memory. ``input_embedding`` is the matrix with a row for each id.
    ``kept_fp32`` has, by the dtype that a model is loaded in, the names in memory that are fp32 all the same.
    ``optional`` and ``ignored`` are patterns of names in memory that may be missing or left over. ``renamed`` makes
    names in older files, or in files of the base model, those in memory. ``rope_types`` are the kinds of rotary
    embedding that the model computes, as transformers names them. ``notes`` are for the user.
    """

    class_name: str
    memory: Mapping[str, tuple[int, ...]]
    disk: Mapping[str, Origin]
    tied: Mapping[str, str]
    input_embedding: str | None
    kept_fp32: Mapping[DType, frozenset[str]] = field(default_factory=dict)
    transient: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    base_prefix: str = ""
    renamed: Callable[[str], str] = str
    rope_types: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()

    def keeps_fp32(self, name: str, dtype: DType) -> bool:
        """Whether the class loads the tensor ``name`` (as on disk) in fp32 when the model is loaded in ``dtype``."""
        kept = self.kept_fp32.get(dtype, frozenset())
        return any(piece.name in kept for piece in self.disk[name].pieces)


def ask_architecture(config: Mapping[str, Any], code: Mapping[str, bytes], *, trust_remote_code: bool) -> Architecture:
    """What the class that ``config`` names expects; ``code`` are the checkpoint's own Python files by name.

    Raises:
        RefusedError: the class is custom code that may not be imported, is unknown to this transformers, or stores
            its weights in a form that those in memory cannot be brought into exactly.
        CheckpointError: the class does not accept the config.
    """
    model = build_model(config, code, trust_remote_code=trust_remote_code)
    described = _describe(model)
    if trust_remote_code and own_class(config) is not None and type(model).__module__.startswith("transformers."):
        note = f"The checkpoint's own code does not run here; transformers' own {described.class_name} takes its place."
        return replace(described, notes=(note,))
    return described


def _describe(model: Any) -> Architecture:
    state = _state(model)
    tied = _tied_names(model, state)
    disk = disk_origins(model, {name: tensor for name, tensor in state.items() if name not in tied})
    return Architecture(
        class_name=type(model).__name__,
        memory={name: tuple(tensor.shape) for name, tensor in state.items()},
        disk=disk,
        tied=tied,
        input_embedding=_input_embedding(model, disk),
        kept_fp32={dtype: _kept_fp32(model, state, dtype) for dtype in (DType.BF16, DType.F16)},
        transient={
            name: tuple(buffer.shape)
            for name, buffer in model.named_buffers(remove_duplicate=False)
            if name not in state
        },
        optional=tuple(model._keys_to_ignore_on_load_missing or ()),
        ignored=tuple(model._keys_to_ignore_on_load_unexpected or ()),
        base_prefix=str(model.base_model_prefix or ""),
        renamed=_forward_renaming(model, state),
        rope_types=_rope_types(model),
    )


def _state(model: Any) -> dict[str, torch.Tensor]:
    """The tensors of the state dict: the model's own, and not a new one for each."""
    import torch

    saved = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in saved.items() if isinstance(tensor, torch.Tensor)}


def _input_embedding(model: Any, disk: Mapping[str, Origin]) -> str | None:
    """The name on disk of the input embedding; None for a model that has none."""
    try:
        weight = getattr(model.get_input_embeddings(), "weight", None)
    except (AttributeError, NotImplementedError):
        # The library's classes without one raise the latter; a custom class that asks a part without one, the former.
        return None
    names = {name for name, own in model.named_parameters(remove_duplicate=False) if own is weight}
    return next((name for name, origin in disk.items() if origin.name in names), None)


def _tied_names(model: Any, state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Alias → stored name, as the class and its config say; the library expands the patterns."""
    expanded = model.get_expanded_tied_weights_keys(all_submodels=True)
    tied = {alias: target for alias, target in expanded.items() if alias in state and target in state}
    return {alias: _last_target(tied, target) for alias, target in tied.items()}


def _last_target(tied: Mapping[str, str], name: str) -> str:
    seen = {name}
    while name in tied and tied[name] not in seen:
        name = tied[name]
        seen.add(name)
    return name


def _kept_fp32(model: Any, state: Mapping[str, torch.Tensor], dtype: DType) -> frozenset[str]:
    """The names that from_pretrained loads in fp32 all the same: made so by the class, or by the class's lists.

    ``_keep_in_fp32_modules`` counts for fp16 only, ``_keep_in_fp32_modules_strict`` for bf16 too; their patterns match
    anywhere in a name, with ``*`` for any text (seen in 5.24, ``_get_dtype_plan`` and ``build_glob_alternation``).
    """
    import torch

    plan = [re.compile(pattern.replace("*", ".*")) for pattern in model._get_dtype_plan(dtype.torch)]
    return frozenset(
        name
        for name, tensor in state.items()
        if tensor.dtype is torch.float32
        or (tensor.is_floating_point() and any(pattern.search(name) for pattern in plan))
    )


def _rope_types(model: Any) -> frozenset[str]:
    """The kinds that the library's rotary embeddings say of themselves; Falcon builds one also where it uses ALiBi."""
    if getattr(model.config, "alibi", False):
        return frozenset()
    kinds = (getattr(module, "rope_type", None) for module in model.modules())
    return frozenset(kind for kind in kinds if isinstance(kind, str))


def _forward_renaming(model: Any, state: Mapping[str, torch.Tensor]) -> Callable[[str], str]:
    """The library's own renaming of a name in a file, without its conversions."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    known, prefix = dict.fromkeys(state, True), model.base_model_prefix  # it asks whether a name is there, no more
    return lambda name: str(rename_source_key(name, renamings, [], prefix, known)[0])
