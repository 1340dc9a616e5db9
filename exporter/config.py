"""config.json, generation_config.json and adapter_config.json: edited as JSON, never re-made.

Loading a config into its class and saving it again drops and renames keys that other readers need. Only what the
export changes is changed: the dtype, the rows of the vocabulary, the special token ids, and what only this machine can
resolve.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from exporter.checkpoints.folder import read_json
from exporter.code import localize
from exporter.errors import CheckpointError, RefusedError
from exporter.local_paths import is_local_path
from exporter.tensors import DType
from exporter.tokenizer import Vocabulary

_NEOX_ROTARY_PCT = 0.25
"""GPTNeoXConfig's default share of rotated dimensions, in transformers 4 and 5."""

_SCALING = frozenset({"type", "rope_type", "factor"})
_SIMPLE_ROPE_KEYS = _SCALING | {"rope_theta", "partial_rotary_factor"}
_SIMPLE_ROPE_KINDS = ("default", "linear", "dynamic")
"""The kinds of rotary embedding that have these keys alone."""

_TRAINERS_PATHS = ("_name_or_path", "output_dir", "logging_dir")

_GENERATING = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def read_config(folder: Path, changes: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """The model's config.json, with ``changes`` that the training made to the part that describes the vocabulary.

    Raises:
        CheckpointError: it is not there or broken, or names its classes in a form that nothing can read.
        RefusedError: it describes quantized weights, which have no bf16, fp16 or fp32 form to export.
    """
    if not (folder / "config.json").exists():
        raise CheckpointError(
            "There is no config.json in the checkpoint folder, so nothing says what model its weights belong to.",
            "Copy the config.json of the model that was trained into the checkpoint folder.",
        )
    config = read_json(folder / "config.json")
    classes = config.get("architectures")
    if classes is not None and not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise CheckpointError(
            f"config.json: architectures is {classes!r}, and not a list of class names.",
            "Take the config.json of the model that was trained.",
        )
    if config.get("quantization_config"):
        raise RefusedError(
            "config.json has a quantization_config: quantized weights are not exported.",
            "Dequantize the model first, or remove the key if the weights are not quantized.",
        )
    _text_part(config).update(changes)
    return config


def read_generation_config(folder: Path) -> dict[str, Any] | None:
    """The checkpoint's generation_config.json, or None where it has none."""
    path = folder / "generation_config.json"
    return read_json(path) if path.exists() else None


def edit_config(config: Mapping[str, Any], *, vocabulary: Vocabulary, rows: int | None, dtype: DType) -> dict[str, Any]:
    """config.json for weights of ``dtype`` and an embedding of ``rows`` rows (None: the model has no embedding).

    transformers 4 looks for ``torch_dtype`` and, at the top level, for what transformers 5 keeps in ``dtype`` and
    ``rope_parameters``: both are written. ``_name_or_path`` goes: it is the trainer's path, and a relative one looks
    like a Hub id. So do other paths of the trainer, which nobody else can open.
    """
    edited = dict(config) if rows is None else with_rows(config, rows)
    edited = copy.deepcopy(edited)
    edited |= {"dtype": dtype.value, "torch_dtype": dtype.value}
    for part in _parts(edited):
        for key in part.keys() - _without_paths(part).keys():
            del part[key]
        if "dtype" in part or "torch_dtype" in part:
            part |= {key: dtype.value for key in ("dtype", "torch_dtype") if key in part}
        _copy_rope(part)
    for part in (edited, *([] if _text_part(edited) is edited else [_text_part(edited)])):
        _agree_on_tokens(part, vocabulary)
    if edited.get("auto_map"):
        edited["auto_map"] = localize(edited["auto_map"])
    return edited


def with_rows(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The config with a vocabulary of ``rows`` rows, and nothing else changed."""
    edited = copy.deepcopy(dict(config))
    _text_part(edited)["vocab_size"] = rows
    return edited


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a model whose output matrix is not the input embedding."""
    edited = copy.deepcopy(dict(config))
    for part in (edited, _text_part(edited)):
        part["tie_word_embeddings"] = False
    return edited


def with_rope_scaling(config: Mapping[str, Any], kind: str, factor: float) -> dict[str, Any]:
    """The config with a rotary embedding that is scaled by ``factor``; ``kind`` is linear or dynamic.

    ``rope_scaling`` is what Open-Assistant's export script sets (``model/model_training/tools/export_model.py``):
    transformers 4 and 5 read it. ``rope_parameters``, where transformers 5 wrote it, says the same.

    Raises:
        RefusedError: the rotary embedding is scaled in another way already, or differs from layer to layer.
    """
    edited = copy.deepcopy(dict(config))
    part = _text_part(edited)
    old = {**_nested(part, "rope_parameters"), **_nested(part, "rope_scaling")}
    present = old.get("rope_type", old.get("type", "default"))
    if old.keys() - _SIMPLE_ROPE_KEYS or present not in _SIMPLE_ROPE_KINDS:
        raise RefusedError(
            f"config.json describes a rotary embedding of its own ({present}), which {kind} scaling would not keep.",
            "Leave --rope_scaling_factor out, or remove that scaling from config.json.",
        )
    part["rope_scaling"] = {"type": kind, "factor": factor}
    if isinstance(part.get("rope_parameters"), dict):
        kept = {key: value for key, value in old.items() if key not in _SCALING}
        part["rope_parameters"] = {**kept, "rope_type": kind, "factor": factor}
    return edited


def edit_generation_config(
    generation_config: Mapping[str, Any] | None, config: Mapping[str, Any], vocabulary: Vocabulary
) -> dict[str, Any] | None:
    """generation_config.json with the tokenizer's special token ids; made where a generating model has none.

    Custom code that has none gets none: it may not know what to do with it.
    """
    if generation_config is None:
        architecture = str((config.get("architectures") or [""])[0])
        if config.get("auto_map") or not architecture.endswith(_GENERATING):
            return None
    edited = _without_paths(copy.deepcopy(dict(generation_config or {})))
    _agree_on_tokens(edited, vocabulary, stops=True)
    return edited


def edit_adapter_config(adapter: Mapping[str, Any], base_model: str, revision: str) -> dict[str, Any]:
    """adapter_config.json of an adapter for the model ``base_model`` on the Hub at the commit ``revision``.

    It is for inference, and without paths of the trainer. Settings: ``peft/config.py`` of PEFT 0.21.
    """
    edited = {key: _without_paths(value) if isinstance(value, dict) else value for key, value in adapter.items()}
    named = {"base_model_name_or_path": base_model, "revision": revision, "inference_mode": True}
    return _without_paths(edited) | named


def vocabulary_rows(config: Mapping[str, Any]) -> int | None:
    """The rows of the embedding that ``config`` describes; None where it does not say."""
    rows = _text_part(dict(config)).get("vocab_size")
    return rows if isinstance(rows, int) else None


def dump_json(value: Mapping[str, Any]) -> bytes:
    """JSON as Hugging Face libraries write it."""
    return (json.dumps(value, indent=2) + "\n").encode()


def _parts(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The config itself and the configs of the model's parts, such as text_config."""
    nested = [value for key, value in config.items() if key.endswith("_config") and isinstance(value, dict)]
    return [config, *nested]


def _without_paths(part: Mapping[str, Any]) -> dict[str, Any]:
    """``part`` without the keys that hold a path of the trainer's machine."""
    return {key: value for key, value in part.items() if key not in _TRAINERS_PATHS and not is_local_path(value)}


def _text_part(config: dict[str, Any]) -> dict[str, Any]:
    """The config that describes the vocabulary."""
    text = config.get("text_config")
    return text if isinstance(text, dict) and "vocab_size" not in config else config


def _copy_rope(part: dict[str, Any]) -> None:
    """Write the rotary embedding where transformers 4.57 reads it; its defaults would load without a word."""
    parameters = part.get("rope_parameters")
    if not isinstance(parameters, dict):
        return
    rope = _nested(parameters, "full_attention") or parameters
    if "rope_theta" not in rope:
        return
    part["rope_theta"] = rope["rope_theta"]
    if "partial_rotary_factor" in rope:
        part["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if str(part.get("model_type")).startswith("gpt_neox"):
        part["rotary_emb_base"] = rope["rope_theta"]
        part["rotary_pct"] = rope.get("partial_rotary_factor", _NEOX_ROTARY_PCT)
    if "rope_theta" in (sliding := _nested(parameters, "sliding_attention")):
        part["rope_local_base_freq"] = sliding["rope_theta"]
    if rope.get("rope_type", "default") != "default" and not part.get("rope_scaling"):
        elsewhere = ("rope_theta", "partial_rotary_factor")
        part["rope_scaling"] = {key: value for key, value in rope.items() if key not in elsewhere}


def _nested(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key)
    return value if isinstance(value, dict) else {}


def _agree_on_tokens(part: dict[str, Any], vocabulary: Vocabulary, stops: bool = False) -> None:
    """bos, eos and pad ids as the tokenizer has them; generation also stops at the end of a turn."""
    for key, number in (("bos_token_id", vocabulary.bos_id), ("pad_token_id", vocabulary.pad_id)):
        if number is not None:
            part[key] = number
    if vocabulary.eos_id is None:
        return
    present = part.get("eos_token_id")
    ids = present if isinstance(present, list) and vocabulary.eos_id in present else [vocabulary.eos_id]
    if stops and vocabulary.end_of_turn_id is not None and vocabulary.end_of_turn_id not in ids:
        ids = [*ids, vocabulary.end_of_turn_id]
    part["eos_token_id"] = ids if len(ids) > 1 else ids[0]
