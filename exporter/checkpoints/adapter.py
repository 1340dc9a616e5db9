"""LoRA adapters: ``adapter_config.json`` and ``adapter_model.safetensors`` or ``.bin``, merged or kept.

Settings: ``peft/tuners/lora/config.py`` of PEFT 0.21. One that may change what an adapter means, and is not known
here, is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from exporter.checkpoints.checkpoint import Checkpoint, refuse_tag
from exporter.checkpoints.folder import is_name, read_json
from exporter.checkpoints.lora import BiasTensor, LoraTensor, MergedTensor, TokensTensor
from exporter.checkpoints.merge import MERGE_ELSEWHERE, Merge
from exporter.checkpoints.pretrained import is_pretrained, read_weights
from exporter.checkpoints.targets import require_targets
from exporter.errors import CheckpointError, IncompleteCheckpointError, RefusedError
from exporter.tensors import LazyTensor, SourceFiles, is_same

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
BASE_HINT = "Name the model that the adapter was trained onto with --base_model, a folder or NS/NAME on the Hub."
_WEIGHTS = (WEIGHTS, "adapter_model.bin")

_UNDERSTOOD = frozenset(
    [
        "alpha_pattern",
        "fan_in_fan_out",
        "lora_alpha",
        "lora_bias",
        "peft_type",
        "r",
        "rank_pattern",
        "trainable_token_indices",
        "use_dora",
        "use_rslora",
        "init_lora_weights",
        "base_model_name_or_path",
        "revision",
        "task_type",
        "bias",
        "ensure_weight_tying",
        "modules_to_save",
    ]
)
_HARMLESS = frozenset(
    [
        "auto_mapping",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "corda_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "runtime_config",
        "target_modules",
    ]
)
"""Settings of the training, or that say which modules have factors: the factors themselves say so too."""

_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of ``init_lora_weights`` that leave the base's weights as they are."""

_HEADS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_OTHER_HEADS = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}


def is_adapter(folder: Path) -> bool:
    """Whether ``folder`` holds what PEFT saves of a model: an adapter, without the model."""
    return (folder / CONFIG).exists()


def open_adapter(folder: Path, tag: str | None) -> Checkpoint:
    """The adapter's own tensors, not yet merged into its base.

    Raises:
        CheckpointError: a file is missing, damaged or unsafe to read.
        RefusedError: the adapter is of a kind that is not merged, or a model's weights lie beside it.
        UsageError: a tag is asked for, which an adapter has not.
    """
    refuse_tag(tag, folder)
    config = read_json(folder / CONFIG)
    _require_supported(config)
    if is_pretrained(folder):
        raise RefusedError(
            f"{CONFIG} and a model's weights are both there: either may be what was trained.",
            "Move the one that is not to be exported out of the folder.",
        )
    found = [name for name in _WEIGHTS if (folder / name).exists()]
    if not found:
        raise IncompleteCheckpointError(f"{CONFIG} is there, {WEIGHTS} is missing.", "Copy it too.")
    return Checkpoint(format="adapter", folder=folder, model=read_weights(folder / found[0]), adapter=config)


def base_name(adapter: Mapping[str, Any]) -> str:
    """The base model as an adapter_config.json names it: a folder, or NS/NAME with @REVISION where it has one.

    Raises:
        CheckpointError: it names none.
    """
    name, revision = adapter.get("base_model_name_or_path"), adapter.get("revision")
    if not is_name(name):
        raise CheckpointError(f"{CONFIG} names no base model.", BASE_HINT)
    return f"{name}@{revision}" if is_name(revision) and not Path(str(name)).is_dir() else str(name)


def merge_adapter(checkpoint: Checkpoint, base: Checkpoint) -> Checkpoint:
    """``checkpoint``, an adapter, merged into ``base``, the model that it was trained onto.

    The tensors have the base's names and are computed when they are read.

    Raises:
        CheckpointError: a tensor of the adapter matches none of the base's.
        RefusedError: the base is no Hugging Face model, or the merge changes nothing, or nothing that is defined.
    """
    config, merge, tensors = _merged(checkpoint, base)
    head = _own_head(config, merge, tensors)
    changes = {**_new_rows(config, merge.base, tensors), **({"tie_word_embeddings": False} if head else {})}
    return replace(checkpoint, model={**tensors, **head}, base=base, config_changes=changes)


def keep_adapter(checkpoint: Checkpoint, base: Checkpoint) -> Checkpoint:
    """``checkpoint``, an adapter, as it is, with the ``base`` that every tensor of it has a place in.

    Raises:
        CheckpointError: a tensor of the adapter matches none of the base's, or is not what the adapter's config says.
        RefusedError: the base is no Hugging Face model, or the adapter changes nothing.
    """
    config, merge, tensors = _merged(checkpoint, base)
    if any(module.endswith(f".{name}") for module, name in merge.modules.items()):
        raise RefusedError(
            "The adapter was trained onto the model without its head, and PEFT would not find its places in the whole.",
            "Leave --keep_adapter out to merge it.",
        )
    require_targets(checkpoint.adapter or {}, merge.modules_with_factors)
    return replace(checkpoint, base=base, config_changes=_new_rows(config, merge.base, tensors))


def _merged(checkpoint: Checkpoint, base: Checkpoint) -> tuple[Mapping[str, Any], Merge, Mapping[str, LazyTensor]]:
    """The base's config.json, the adapter matched with the base, and every tensor of the merged model."""
    if base.format != "pretrained" or not (base.folder / "config.json").exists():
        raise RefusedError(
            f"The base model {base.folder.name} has no config.json with model.safetensors or pytorch_model.bin.",
            "Export it first, and name the exported folder with --base_model.",
        )
    adapter = checkpoint.adapter or {}
    config = read_json(base.folder / "config.json")
    _require_fitting(config, adapter)
    merge = Merge.of(adapter, checkpoint.model or {}, base.model or {})
    tensors = merge.tensors()
    _require_change(merge, tensors)
    return config, merge, tensors


# What is merged, and what is not


def _require_supported(config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise RefusedError(
            f"{CONFIG}: an adapter of the type {config.get('peft_type')!r:.50} is not merged, only LORA.",
            MERGE_ELSEWHERE,
        )
    for name, value in config.items():
        if value and name not in _UNDERSTOOD | _HARMLESS:
            raise RefusedError(f"{CONFIG} sets {name:.50}, which is not merged.", MERGE_ELSEWHERE)
    start = config.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise RefusedError(
            f"{CONFIG}: init_lora_weights {start!r:.50} changed the base's weights, which the adapter does not hold.",
            "Save it with path_initial_model_for_weight_conversion, or merge it with PEFT and export the result.",
        )


def _require_fitting(config: Mapping[str, Any], adapter: Mapping[str, Any]) -> None:
    """The base has plain weights, and the head that was trained."""
    if config.get("quantization_config"):
        raise RefusedError(
            "The base model's config.json has a quantization_config: nothing is merged into quantized weights.",
            "Name the model that was quantized with --base_model.",
        )
    task, found = str(adapter.get("task_type")), _class_name(config)
    if not found.endswith(_OTHER_HEADS.get(task, "")):
        raise RefusedError(
            f"The adapter was trained with a head for {task}, and the base model is {found or 'of no class'}.",
            MERGE_ELSEWHERE,
        )


def _class_name(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


# What a merge may not be


def _require_change(merge: Merge, tensors: Mapping[str, LazyTensor]) -> None:
    """The merge changes something: an adapter that was never trained has zeros for all its B."""
    if any(isinstance(tensor, LoraTensor) and _is_nonzero(tensor.b) for tensor in tensors.values()):
        return
    if any(isinstance(tensor, (TokensTensor, BiasTensor)) for tensor in tensors.values()):
        return
    if any(not is_same(tensor, merge.base.get(name)) for name, tensor in merge.whole.items()):
        return
    raise RefusedError(
        "The adapter changes nothing: all its lora_B weights are zero, as they are before training.",
        "Check that the adapter was trained and saved after it; export the base model itself if it is wanted.",
    )


def _is_nonzero(tensor: LazyTensor) -> bool:
    with SourceFiles() as files:
        return any(bool(block.count_nonzero()) for block in tensor.blocks(files))


# What becomes of the base's config


def _own_head(config: Mapping[str, Any], merge: Merge, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The head that the merged model has of its own, by name, where its base has only its embedding for both.

    PEFT trains copies of modules that are saved whole: a copy of the embedding leaves the head as it was, and the other
    way round.

    Raises:
        RefusedError: the embedding has factors; PEFT merges them into the head too, which the live model does not.
    """
    embedding = _tied_embedding(config, merge.base)
    if embedding is None:
        return {}
    name = next((name for name in merge.whole if name not in merge.base), "lm_head.weight")
    for place in (embedding, name):
        if isinstance(tensors.get(place), LoraTensor):
            raise RefusedError(f"The adapter has factors for {place}, which the base model ties.", MERGE_ELSEWHERE)
    head = tensors.get(name, merge.base[embedding] if embedding in merge.whole else tensors[embedding])
    if is_same(tensors[embedding], head):
        return {}
    if tensors[embedding].shape != head.shape:
        raise RefusedError(
            f"The adapter makes {embedding} {list(tensors[embedding].shape)}, and {name} is {list(head.shape)}.",
            MERGE_ELSEWHERE,
        )
    return {name: head}


def _tied_embedding(config: Mapping[str, Any], base: Mapping[str, LazyTensor]) -> str | None:
    """The one matrix with a row for each id, in a model that also has a head."""
    if not _class_name(config).endswith(_HEADS):
        return None
    rows = _text_part(config).get("vocab_size")
    found = [name for name, tensor in base.items() if len(tensor.shape) == 2 and tensor.shape[0] == rows]
    same = [name for name in found if base[name].shape == base[found[0]].shape]
    return same[0] if len(same) == 1 else None


def _new_rows(
    config: Mapping[str, Any], base: Mapping[str, LazyTensor], tensors: Mapping[str, LazyTensor]
) -> dict[str, int]:
    """The vocabulary's size, where the embedding was resized in the training."""
    rows = _text_part(config).get("vocab_size")
    resized = (
        tensors[name].shape[0] for name, old in base.items() if old.shape[:1] == (rows,) != tensors[name].shape[:1]
    )
    new = next(resized, None)
    return {} if new is None else {"vocab_size": new}


def _text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config")
    return text if isinstance(text, dict) and "vocab_size" not in config else config


def count_merged(tensors: Iterable[LazyTensor]) -> int:
    """How many of ``tensors`` have something of an adapter in them."""
    return sum(isinstance(part, MergedTensor) for tensor in tensors for part in (tensor, *tensor.sources))
