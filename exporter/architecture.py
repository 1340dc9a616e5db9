"""What the model class says, asked on the meta device: names, shapes, ties, dtype policy, and names on disk.

No weight is ever loaded into the model, and nothing is downloaded. transformers 5 keeps some weights in memory under
other names or fused; what belongs into files is what its own reverse conversion makes of a state dict, which is run
here on meta tensors (seen in 5.24, ``core_model_loading.revert_weight_conversion``).
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.errors import CheckpointError, ExportError, RefusedError
from exporter.tensors import DType, LazyTensor, StoredTensor

if TYPE_CHECKING:
    import torch

_PREFIXES = ("module.", "base_model.model.", "model.")
"""What wrappers (DDP, PEFT, Lightning) put before all names of a model."""

_WRAPPERS = re.compile(r"(?<![^.])_(orig_mod|forward_module|fsdp_wrapped_module|checkpoint_wrapped_module)\.")
"""What torch.compile, Lightning and FSDP put before the names of any module, also inside a model."""


@dataclass(frozen=True)
class Origin:
    """Where a tensor on disk lies in memory: from element ``start`` of the tensor ``name``, ``shape`` elements long."""

    name: str
    start: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Architecture:
    """The model class's expectations; names are those in files unless said otherwise.

    ``memory`` are the shapes of the state dict by their names in memory. ``disk`` maps each name in a file to its
    place in memory. ``tied`` maps an alias to the name that is stored, both as in memory. ``input_embedding`` is the
    matrix with a row for each id. ``fp32_names`` (as in memory) are fp32 in a model that was built in another dtype.
    """

    class_name: str
    memory: Mapping[str, tuple[int, ...]]
    disk: Mapping[str, Origin]
    tied: Mapping[str, str]
    input_embedding: str | None
    fp32_patterns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fp32_names: frozenset[str] = frozenset()
    optional: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    base_prefix: str = ""
    renamed: Callable[[str], str] = str

    def keeps_fp32(self, name: str, dtype: DType) -> bool:
        """Whether the class loads the tensor ``name`` (as on disk) in fp32 when the model is loaded in ``dtype``."""
        memory = self.disk[name].name
        return memory in self.fp32_names or any(
            re.search(pattern.replace("*", ".*"), memory) for pattern in self.fp32_patterns.get(dtype.value, ())
        )


@dataclass(frozen=True)
class Account:
    """Every tensor of a checkpoint: written (by its name on disk), tied to one that is, or dropped for a reason.

    ``tied_values`` are the tensors that were found under tied names, with the name on disk that they should equal.
    """

    weights: Mapping[str, LazyTensor]
    tied: Mapping[str, str]
    dropped: Mapping[str, str]
    tied_values: Mapping[str, tuple[LazyTensor, str]]


def ask_architecture(config: Mapping[str, Any], code: Mapping[str, bytes], *, trust_remote_code: bool) -> Architecture:
    """What the class that ``config`` names expects; ``code`` are the checkpoint's own Python files by name.

    Raises:
        RefusedError: the class is custom code that may not be imported, or is unknown to this transformers.
        CheckpointError: the class does not accept the config.
    """
    import torch

    with quiet_library(), tempfile.TemporaryDirectory(prefix="architecture-") as folder, torch.device("meta"):
        model = _build(Path(folder), config, code if trust_remote_code else {}, trust_remote_code)
        return _describe(model)


def _build(folder: Path, config: Mapping[str, Any], code: Mapping[str, bytes], trusted: bool) -> Any:
    """The model as from_pretrained builds it in bf16: what is fp32 then, the class itself made so."""
    import torch
    from transformers import AutoConfig

    (folder / "config.json").write_text(json.dumps(config))
    for name, content in code.items():
        (folder / name).write_bytes(content)
    kind = str((config.get("architectures") or [config.get("model_type")])[0])
    try:
        parsed = AutoConfig.from_pretrained(folder, trust_remote_code=trusted, local_files_only=True)
        return _model_class(folder, config, parsed, trusted)._from_config(parsed, dtype=torch.bfloat16)
    except ExportError:
        raise
    except Exception as error:
        if config.get("auto_map") and not trusted:
            raise RefusedError(
                f"{kind} is the checkpoint's own code, which may not be imported.",
                "Read its *.py files; if you trust them, add --trust_remote_code.",
            ) from error
        raise CheckpointError(
            f"config.json does not describe a model that transformers can build as {kind}: {_one_line(error)}",
            "Use the config.json that the model was trained with, and a transformers that knows it.",
        ) from error


def _model_class(folder: Path, config: Mapping[str, Any], parsed: Any, trusted: bool) -> Any:
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    names = config.get("architectures") or []
    own = {entry.rpartition(".")[2]: entry for entry in _entries(config.get("auto_map")) if isinstance(entry, str)}
    if not names:
        return transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(parsed)]
    if trusted and names[0] in own:
        return get_class_from_dynamic_module(own[names[0]], folder, local_files_only=True)
    known = getattr(transformers, str(names[0]), None)
    if known is None and names[0] in own:
        raise RefusedError(
            f"{names[0]} is the checkpoint's own code, which may not be imported.",
            "Read its *.py files; if you trust them, add --trust_remote_code.",
        )
    if known is None:
        raise RefusedError(
            f"config.json names the architecture {names[0]!r}, which transformers {transformers.__version__} lacks.",
            "Install a transformers that has it.",
        )
    return known


def _entries(auto_map: Any) -> Iterator[Any]:
    for value in auto_map.values() if isinstance(auto_map, dict) else ():
        yield from value if isinstance(value, list) else [value]


@contextmanager
def quiet_library() -> Iterator[None]:
    """Without transformers' progress bars and its remarks on configs that the user did not write."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _describe(model: Any) -> Architecture:
    import torch

    state = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
    tied = _tied_names(model, state)
    disk = _disk_origins(model, {name: tensor for name, tensor in state.items() if name not in tied})
    return Architecture(
        class_name=type(model).__name__,
        memory={name: tuple(tensor.shape) for name, tensor in state.items()},
        disk=disk,
        tied=tied,
        input_embedding=_input_embedding(model, disk),
        fp32_patterns={dtype.value: _fp32_patterns(model, dtype) for dtype in (DType.BF16, DType.F16)},
        fp32_names=frozenset(name for name, tensor in state.items() if tensor.dtype is torch.float32),
        optional=tuple(getattr(model, "_keys_to_ignore_on_load_missing", None) or ()),
        ignored=tuple(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()),
        base_prefix=str(getattr(model, "base_model_prefix", "") or ""),
        renamed=_forward_renaming(model),
    )


def _input_embedding(model: Any, disk: Mapping[str, Origin]) -> str | None:
    """The name on disk of the input embedding; None for a model that has none."""
    try:
        weight = getattr(model.get_input_embeddings(), "weight", None)
    except (AttributeError, NotImplementedError):
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


def _fp32_patterns(model: Any, dtype: DType) -> tuple[str, ...]:
    """As from_pretrained has it (``_get_dtype_plan``): the plain list counts for fp16, the strict one for bf16 too."""
    strict = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    plain = set(getattr(model, "_keep_in_fp32_modules", None) or ()) if dtype is DType.F16 else set()
    return tuple(sorted(strict | plain))


def _forward_renaming(model: Any) -> Callable[[str], str]:
    """From older names in files to names in memory, for names that the library only renames."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    return lambda name: str(rename_source_key(name, renamings, [])[0])


def _disk_origins(model: Any, state: dict[str, torch.Tensor]) -> dict[str, Origin]:
    """The names in files, each with its place in memory.

    The reverse conversion cuts fused weights with views, and copies of them for the file's sake. With the copies left
    out, each result is a view that still knows the storage, offset and strides it came from.
    """
    from transformers.core_model_loading import revert_weight_conversion

    sources = {name: tensor.detach().clone() for name, tensor in state.items()}
    owners = {tensor.untyped_storage()._cdata: name for name, tensor in sources.items()}
    try:
        with _views_only():
            converted = revert_weight_conversion(model, sources)
    except RuntimeError as error:
        raise _no_way_back(type(model).__name__) from error
    origins = {name: _origin(name, tensor, owners) for name, tensor in converted.items()}
    order = {name: position for position, name in enumerate(state)}
    return dict(sorted(origins.items(), key=lambda item: (order[item[1].name], item[1].start)))


def _origin(name: str, tensor: torch.Tensor, owners: Mapping[int, str]) -> Origin:
    owner = owners.get(tensor.untyped_storage()._cdata)
    if owner is None or not tensor.is_contiguous():
        raise _no_way_back(name)
    return Origin(owner, int(tensor.storage_offset()), tuple(tensor.shape))


def _no_way_back(name: str) -> RefusedError:
    return RefusedError(
        f"{name} is stored in another form than it has in memory, and there is no exact way back.",
        "Export it with save_pretrained of the transformers that trained it.",
    )


def _views_only() -> Any:
    """A mode in which ``clone`` and ``contiguous`` give back the view that they were asked to copy.

    An operation that writes into a tensor raises RuntimeError: its result would pass for a view of the source.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class ViewsOnly(TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.clone.default:
                return torch.ops.aten.alias.default(args[0])
            if func._schema.is_mutable:
                raise RuntimeError(f"{func} changes values")
            return func(*args, **(kwargs or {}))

    return ViewsOnly()


def account(architecture: Architecture, tensors: Mapping[str, LazyTensor], aliases: Mapping[str, str]) -> Account:
    """Match the checkpoint's ``tensors`` with what the architecture expects, name by name and shape by shape.

    ``aliases`` are the checkpoint's own ties: names that are stored under another.

    Raises:
        CheckpointError: a tensor is missing, left over or of another shape.
    """
    full = dict(tensors) | {alias: tensors[name] for alias, name in aliases.items() if name in tensors}
    readings = [_read_as(architecture, renamed) for renamed in _renamings(architecture, full)]
    best = min(readings, key=lambda reading: len(reading.missing) + len(reading.unexpected) + len(reading.misshapen))
    _require_complete(architecture, best)
    return best.account


@dataclass(frozen=True)
class _Reading:
    account: Account
    missing: list[str]
    unexpected: list[str]
    misshapen: list[str]


def _renamings(architecture: Architecture, tensors: Mapping[str, LazyTensor]) -> Iterator[dict[str, LazyTensor]]:
    """The tensors under the names that they may mean, likelier ones first."""
    yield dict(tensors)
    if any(_WRAPPERS.search(name) for name in tensors):
        for bare in _rename(tensors, lambda name: _WRAPPERS.sub("", name)):
            yield from _renamings(architecture, bare)
    for prefix in _PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            yield from _renamings(architecture, {name[len(prefix) :]: tensor for name, tensor in tensors.items()})
    if architecture.base_prefix:
        yield {f"{architecture.base_prefix}.{name}": tensor for name, tensor in tensors.items()}
    yield from _rename(tensors, architecture.renamed)


def _rename(tensors: Mapping[str, LazyTensor], renamed: Callable[[str], str]) -> Iterator[dict[str, LazyTensor]]:
    """The tensors under new names, unless two of them would have one name, and one be lost."""
    result = {renamed(name): tensor for name, tensor in tensors.items()}
    if len(result) == len(tensors):
        yield result


def _read_as(architecture: Architecture, tensors: Mapping[str, LazyTensor]) -> _Reading:
    in_memory = sum(name in architecture.memory for name in tensors)
    on_disk = sum(name in architecture.disk for name in tensors)
    find = (_find_in_memory if in_memory > on_disk else _find_on_disk)(architecture, tensors)
    weights, missing, misshapen = {}, [], []
    for name, origin in architecture.disk.items():
        tensor = find(name)
        if tensor is None:
            if not any(re.search(pattern, name) for pattern in architecture.optional):
                missing.append(name)
        elif tensor.shape != origin.shape:
            misshapen.append(f"{name} {list(tensor.shape)}, expected {list(origin.shape)}")
        else:
            weights[name] = tensor
    known = architecture.memory.keys() if in_memory > on_disk else architecture.disk.keys()
    return _sort_rest(architecture, tensors, weights, known, missing, misshapen)


def _sort_rest(
    architecture: Architecture,
    tensors: Mapping[str, LazyTensor],
    weights: Mapping[str, LazyTensor],
    known: Any,
    missing: list[str],
    misshapen: list[str],
) -> _Reading:
    """The tensors that are not written: tied aliases, what the class ignores, and what nobody expects."""
    places = {origin.name: name for name, origin in architecture.disk.items()}
    tied: dict[str, str] = {}
    values: dict[str, tuple[LazyTensor, str]] = {}
    dropped: dict[str, str] = {}
    unexpected = []
    for name, tensor in tensors.items():
        target = _tied_target(architecture, name)
        if target is not None:
            tied[name] = places[target]
            values[name] = (tensor, tied[name])
            dropped[name] = f"tied to {tied[name]}"
        elif name in known:
            continue
        elif any(re.search(pattern, name) for pattern in architecture.ignored) or _is_derived(name, tensor):
            dropped[name] = "not loaded by the architecture"
        else:
            unexpected.append(name)
    for alias, target in architecture.tied.items():
        tied.setdefault(alias, places[target])
    return _Reading(Account(weights, tied, dropped, values), missing, unexpected, misshapen)


def _is_derived(name: str, tensor: LazyTensor) -> bool:
    """Buffers that old versions of the library saved and that every later one computes.

    They are rotary frequencies (a vector), causal masks ([1, 1, n, n]) and the value of what is masked (a scalar).
    """
    if re.search(r"\.rotary_emb\.inv_freq$", name):
        return len(tensor.shape) == 1
    if re.search(r"\.attn\.bias$|\.attention\.bias$", name):
        return len(tensor.shape) == 4 and tensor.shape == (1, 1, tensor.shape[-1], tensor.shape[-1])
    return re.search(r"\.masked_bias$", name) is not None and tensor.numel == 1


def _tied_target(architecture: Architecture, name: str) -> str | None:
    """The stored name in memory that ``name``, in memory or on disk, is an alias of."""
    if name in architecture.tied or name in architecture.disk:
        return architecture.tied.get(name)
    return architecture.tied.get(architecture.renamed(name))


def _find_in_memory(
    architecture: Architecture, tensors: Mapping[str, LazyTensor]
) -> Callable[[str], LazyTensor | None]:
    """From a name on disk to that part of the tensors in memory; a tied name stands for the one that is stored."""
    aliases = _by_target(architecture, tensors)

    def find(name: str) -> LazyTensor | None:
        origin = architecture.disk[name]
        whole = tensors.get(origin.name, aliases.get(origin.name))
        if whole is None or origin.shape == architecture.memory[origin.name]:
            return whole
        if whole.shape != architecture.memory[origin.name] or not isinstance(whole, StoredTensor):
            return whole
        return whole.slice(origin.start, origin.shape)

    return find


def _find_on_disk(architecture: Architecture, tensors: Mapping[str, LazyTensor]) -> Callable[[str], LazyTensor | None]:
    """From a name on disk to the tensor; a tied name stands for the one that is stored."""
    aliases = _by_target(architecture, tensors)
    return lambda name: tensors.get(name, aliases.get(architecture.disk[name].name))


def _by_target(architecture: Architecture, tensors: Mapping[str, LazyTensor]) -> dict[str | None, LazyTensor]:
    """The tensors under tied names, by the name in memory that is stored for them."""
    return {_tied_target(architecture, name): tensor for name, tensor in tensors.items()}


def _require_complete(architecture: Architecture, reading: _Reading) -> None:
    kinds = (("missing", reading.missing), ("unexpected", reading.unexpected), ("of another shape", reading.misshapen))
    faults = [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for kind, names in kinds
        if names
    ]
    if any("lora_" in name for name in reading.unexpected):
        raise CheckpointError(
            f"The checkpoint holds LoRA weights ({len(reading.unexpected)} tensors), not those of a whole "
            f"{architecture.class_name}.",
            "Merge them into their base model with peft (merge_and_unload) and save it, then export that.",
        )
    if faults:
        raise CheckpointError(
            f"The weights are not those of {architecture.class_name}: {'; '.join(faults)}.",
            "Check that config.json belongs to these weights and that the checkpoint is whole.",
        )


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:300] + "…"
