"""What becomes of a checkpoint's weights: matched with the architecture, grown, given a dtype and a place in a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from exporter.architecture import Account, Architecture, account, ask_architecture, name_layers
from exporter.checkpoints import Checkpoint
from exporter.checkpoints.adapter import WEIGHTS as ADAPTER_WEIGHTS
from exporter.config import read_config, untied, vocabulary_rows, with_rows
from exporter.errors import CheckpointError, RefusedError
from exporter.options import TARGETS, Options
from exporter.plan import ExportPlan, plan_export, plan_file
from exporter.tensors import DType, GrownTensor, LazyTensor
from exporter.tokenizer import Vocabulary, embedding_rows
from exporter.verify import require_equal


@dataclass(frozen=True)
class PlannedWeights:
    """What becomes of the weights: the files that they are written to, and where they come from.

    ``class_name`` is the architecture's. ``weights`` is the set that is read (master or model), ``dtype`` what
    config.json says, ``rows`` those of the embedding (None: there is none). ``config`` is config.json for these
    weights, apart from dtype, rows and tokens; of an adapter that of its base. ``copies`` are the model's own weights
    where the master weights are written. ``notes`` are for the user.
    """

    plan: ExportPlan
    account: Account
    class_name: str
    config: Mapping[str, Any]
    weights: str
    dtype: DType
    rows: int | None
    copies: Mapping[str, LazyTensor]
    notes: tuple[str, ...]


def plan_adapter(options: Options, checkpoint: Checkpoint) -> PlannedWeights:
    """All tensors of an adapter in one file, under the names that they have."""
    config = read_config(checkpoint.config_folder, checkpoint.config_changes)
    target = TARGETS[options.dtype]
    chosen = checkpoint.choose(options.weights, lambda: True)
    weights = checkpoint.weights(chosen)
    dtypes = {name: target if target and tensor.dtype.is_floating else tensor.dtype for name, tensor in weights.items()}
    plan = plan_file(ADAPTER_WEIGHTS, weights, dtypes, options.max_shard_size)
    return PlannedWeights(
        plan=plan,
        account=Account(weights=weights, tied={}, dropped={}, tied_values={}),
        class_name=str((config.get("architectures") or [""])[0]),
        config=config,
        weights=chosen,
        dtype=target or _most_common(plan),
        rows=vocabulary_rows(config),
        copies={},
        notes=plan.notes,
    )


def plan_weights(
    options: Options,
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    code: Mapping[str, bytes],
    vocabulary: Vocabulary,
) -> PlannedWeights:
    """Match the checkpoint's weights with the architecture, let the embedding grow, choose dtypes and files."""
    _require_plausible_size(checkpoint, config)
    architecture = ask_architecture(config, code, trust_remote_code=options.trust_remote_code)
    if checkpoint.format == "pipeline":
        checkpoint = checkpoint.renamed(name_layers(architecture, checkpoint.model or {}))
    _require_rope(options, architecture)
    target = TARGETS[options.dtype]
    match = partial(account, aliases=checkpoint.aliases, is_trained_alone=checkpoint.is_trained_alone)

    def is_exact() -> bool:
        return _is_exact(architecture, match(architecture, checkpoint.model or {}), target)

    chosen = checkpoint.choose(options.weights, is_exact)
    tensors = checkpoint.weights(chosen)
    matched, notes = match(architecture, tensors), list(architecture.notes)
    try:
        require_equal(matched.tied_values, matched.weights)
    except RefusedError as refusal:
        config = untied(config)
        architecture = ask_architecture(config, code, trust_remote_code=options.trust_remote_code)
        matched = match(architecture, tensors)
        require_equal(matched.tied_values, matched.weights)
        notes.append(f"{refusal.message} Both are exported, with tie_word_embeddings false.")
    weights, rows = grow(architecture, matched.weights, vocabulary, config, code, options.trust_remote_code)
    dtypes = {name: _written_dtype(architecture, name, tensor.kept_dtype, target) for name, tensor in weights.items()}
    plan = plan_export(weights, dtypes, options.max_shard_size)
    copies: Mapping[str, LazyTensor] = {}
    if chosen == "master" and checkpoint.model is not None:
        copies = account(architecture, checkpoint.model, checkpoint.aliases).weights
    return PlannedWeights(
        plan=plan,
        account=matched,
        class_name=architecture.class_name,
        config=config,
        weights=chosen,
        dtype=target or _most_common(plan),
        rows=rows,
        copies=copies,
        notes=(*notes, *plan.notes),
    )


def _require_rope(options: Options, architecture: Architecture) -> None:
    if options.rope_scaling_factor is not None and options.rope_kind not in architecture.rope_types:
        raise RefusedError(
            f"{architecture.class_name} has no rotary embedding that can be scaled by config.json.",
            "Leave --rope_scaling_type and --rope_scaling_factor out.",
        )


def _require_plausible_size(checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
    """Every layer has a tensor of its own; a config that names more layers would build them without end."""
    tensors = max(len(checkpoint.model or ()), len(checkpoint.master or ()))
    for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        layers = config.get(key)
        if isinstance(layers, int) and layers > tensors:
            raise CheckpointError(
                f"config.json has {key} {layers:.3g}, but the checkpoint has {tensors} tensors.",
                "Use the config.json that the model was trained with.",
            )


def _is_exact(architecture: Architecture, own: Account, target: DType | None) -> bool:
    """Whether every tensor of the model's own weights already has the dtype that will be written."""
    return all(
        tensor.dtype is _written_dtype(architecture, name, tensor.dtype, target) for name, tensor in own.weights.items()
    )


def _written_dtype(architecture: Architecture, name: str, dtype: DType, target: DType | None) -> DType:
    """The dtype in which the tensor ``name`` of ``dtype`` is written."""
    if target is None or not dtype.is_floating:
        return dtype
    return DType.F32 if architecture.keeps_fp32(name, target) else target


def grow(
    architecture: Architecture,
    weights: Mapping[str, LazyTensor],
    vocabulary: Vocabulary,
    config: Mapping[str, Any],
    code: Mapping[str, bytes],
    trust_remote_code: bool,
) -> tuple[dict[str, LazyTensor], int | None]:
    """The weights with enough rows for every id, and the number of rows (None: there is no embedding).

    Which tensors grow is the architecture's to say: it is asked again with the larger vocabulary.

    Raises:
        CheckpointError: there is no row for the eos token, which nobody added.
        RefusedError: a tensor depends on the vocabulary in another way than with a row for each id, the embedding has
            too few rows for tokens that nobody added, or the class does not say which tensor the embedding is.
    """
    embedding = weights.get(architecture.input_embedding or "")
    if embedding is None:
        known = vocabulary_rows(config)
        if vocabulary.added or (known is not None and vocabulary.size > known):
            raise RefusedError(
                f"{architecture.class_name} does not say which tensor its input embedding is, so that nothing shows a "
                f"row for each of the tokenizer's {vocabulary.size} tokens.",
                "Keep the tokenizer that the model was trained with, with --prompt_format none.",
            )
        return dict(weights), None
    old = embedding.shape[0]
    if vocabulary.ordinary_size > old:
        raise RefusedError(
            f"The tokenizer has {vocabulary.ordinary_size} tokens without those added to it, but "
            f"{architecture.input_embedding} has {old} rows: it is not the tokenizer of this model.",
            "Copy the tokenizer that the model was trained with into the checkpoint folder.",
        )
    if vocabulary.eos_id is not None and vocabulary.eos_id >= old and vocabulary.eos_token not in vocabulary.added:
        raise CheckpointError(
            f"The tokenizer's eos token {vocabulary.eos_token!r} has the id {vocabulary.eos_id}, but "
            f"{architecture.input_embedding} has {old} rows: the model was not trained with it.",
            "Correct eos_token in tokenizer_config.json and special_tokens_map.json.",
        )
    rows = embedding_rows(old, vocabulary.size)
    if rows == old:
        return dict(weights), rows
    wider = ask_architecture(with_rows(config, rows), code, trust_remote_code=trust_remote_code).disk
    return {name: _grown(name, tensor, wider[name].shape, old) for name, tensor in weights.items()}, rows


def _grown(name: str, tensor: LazyTensor, shape: tuple[int, ...], old: int) -> LazyTensor:
    if tensor.shape == shape:
        return tensor
    if tensor.shape != (old, *shape[1:]) or not tensor.dtype.is_floating:
        raise RefusedError(
            f"The new tokens make the vocabulary larger, and {name} ({tensor.dtype.value} {list(tensor.shape)}) cannot "
            f"grow to {list(shape)}: new entries of it have no defined value.",
            "Add the tokens before training, or keep the tokenizer with --prompt_format none.",
        )
    return GrownTensor(shape, tensor.dtype, tensor)


def _most_common(plan: ExportPlan) -> DType:
    """The dtype of most floating-point elements."""
    sizes: dict[DType, int] = {}
    for tensor in plan.tensors:
        if tensor.dtype.is_floating:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.source.numel
    return max(sizes, key=lambda dtype: sizes[dtype], default=DType.F32)
