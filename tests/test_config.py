"""config.json, generation_config.json and code: edited so that transformers 4.57 and 5 read the same model."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from exporter.config import dump_json, edit_config, edit_generation_config, read_config
from exporter.errors import CheckpointError, RefusedError
from exporter.tensors import DType
from exporter.tokenizer import Vocabulary

VOCABULARY = Vocabulary(
    files={},
    size=60,
    ordinary_size=58,
    added=(),
    prompt_format="own",
    bos_token="<s>",
    bos_id=1,
    eos_token="</s>",
    eos_id=2,
    pad_token="<pad>",
    pad_id=3,
    end_of_turn="<|end|>",
    end_of_turn_id=59,
    chat_template=None,
    special_tokens={},
)


def edit(config: dict[str, Any], vocabulary: Vocabulary = VOCABULARY) -> dict[str, Any]:
    before = copy.deepcopy(config)
    edited = edit_config(config, vocabulary=vocabulary, rows=64, dtype=DType.BF16)
    assert config == before
    return edited


DEFAULT = {"rope_type": "default", "rope_theta": 5000.0}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LAYER_TYPES = {"layer_types": ["sliding_attention", "full_attention"]}

# The names are those that the configuration classes of transformers 4.57.6 take.
ROPE: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", DEFAULT, {"rope_theta": 5000.0, "rope_scaling": None}),
    "llama3": ("llama", LLAMA3, {"rope_theta": 500000.0, "rope_scaling": LLAMA3.keys() - {"rope_theta"}}),
    "falcon": ("falcon", LINEAR, {"rope_theta": 5000.0, "rope_scaling": {"rope_type", "factor"}}),
    "neox": (
        "gpt_neox",
        DEFAULT | {"partial_rotary_factor": 0.5},
        {"rotary_emb_base": 5000.0, "rotary_pct": 0.5, "rope_scaling": None},
    ),
    "neox scaled": (
        "gpt_neox",
        LINEAR | {"partial_rotary_factor": 1.0},
        {"rotary_emb_base": 5000.0, "rotary_pct": 1.0, "rope_scaling": {"rope_type", "factor"}},
    ),
    "phi3": ("phi3", DEFAULT | {"partial_rotary_factor": 0.5}, {"rope_theta": 5000.0, "partial_rotary_factor": 0.5}),
    "gemma3": (
        "gemma3_text",
        {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 70.0}},
        {"rope_theta": 5000.0, "rope_local_base_freq": 70.0, "rope_scaling": {"rope_type", "factor"}},
    ),
}


@pytest.mark.parametrize(("model_type", "rope", "expected"), ROPE.values(), ids=ROPE)
def test_the_rotary_embedding_stands_where_either_major_of_transformers_reads_it(
    model_type: str, rope: dict[str, Any], expected: dict[str, Any]
) -> None:
    shape = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "max_position_embeddings": 128}
    layers = LAYER_TYPES if model_type.startswith("gemma3") else {}
    config = {"model_type": model_type, "vocab_size": 60, "rope_parameters": rope, "pad_token_id": 3, **shape, **layers}
    edited = edit(config)
    for key, value in expected.items():
        found = edited.get(key)
        assert (found.keys() if isinstance(value, (set, frozenset)) else found) == value, key
    original, read = (AutoConfig.for_model(**copy.deepcopy(each)) for each in (config, edited))
    assert read.rope_parameters == original.rope_parameters


def test_a_config_of_transformers_4_keeps_its_rotary_embedding() -> None:
    edited = edit({"model_type": "llama", "vocab_size": 60, "rope_theta": 7.0, "rope_scaling": None})
    assert edited["rope_theta"] == 7.0
    assert edited["rope_scaling"] is None
    assert "rope_parameters" not in edited


@pytest.mark.parametrize("name", ["/home/me/run/checkpoint-7", "out/checkpoint-7", "./out", "tiiuae/falcon-7b"])
def test_no_path_of_the_trainer_stays(name: str) -> None:
    edited = edit({"vocab_size": 60, "_name_or_path": name, "vision_config": {"_name_or_path": name}})
    assert name not in json.dumps(edited)


def test_the_dtype_is_that_of_the_files_in_every_part() -> None:
    edited = edit(
        {"torch_dtype": "float32", "text_config": {"vocab_size": 60, "dtype": "float32"}, "vision_config": {}}
    )
    assert edited["dtype"] == edited["torch_dtype"] == edited["text_config"]["dtype"] == "bfloat16"
    assert edited["vision_config"] == {}


def test_the_vocabulary_is_described_where_the_config_describes_it() -> None:
    assert edit({"vocab_size": 60})["vocab_size"] == 64
    nested = edit({"text_config": {"vocab_size": 60, "eos_token_id": 9}})
    assert nested["text_config"]["vocab_size"] == 64
    assert nested["text_config"]["eos_token_id"] == 2
    assert "vocab_size" not in nested


def test_special_token_ids_are_the_tokenizers() -> None:
    edited = edit({"vocab_size": 60, "eos_token_id": 7, "pad_token_id": None})
    assert (edited["bos_token_id"], edited["eos_token_id"], edited["pad_token_id"]) == (1, 2, 3)
    assert edit({"eos_token_id": [7, 2]})["eos_token_id"] == [7, 2]
    assert edit({"eos_token_id": [7, 8]})["eos_token_id"] == 2
    assert edit({"pad_token_id": 5}, replace(VOCABULARY, pad_id=None))["pad_token_id"] == 5


def test_generation_stops_at_the_end_of_a_turn_too() -> None:
    llama = {"architectures": ["LlamaForCausalLM"]}
    edited = edit_generation_config({"eos_token_id": 2, "temperature": 0.6}, llama, VOCABULARY)
    assert edited is not None
    assert (edited["eos_token_id"], edited["pad_token_id"], edited["temperature"]) == ([2, 59], 3, 0.6)
    same = edit_generation_config({}, llama, replace(VOCABULARY, end_of_turn_id=2))
    assert same is not None
    assert same["eos_token_id"] == 2


def test_only_a_generating_model_without_code_of_its_own_gets_a_generation_config() -> None:
    assert edit_generation_config(None, {"architectures": ["LlamaForCausalLM"]}, VOCABULARY) is not None
    assert edit_generation_config(None, {"architectures": ["LlamaForSequenceClassification"]}, VOCABULARY) is None
    own = {"architectures": ["TinyForCausalLM"], "auto_map": {"AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM"}}
    assert edit_generation_config(None, own, VOCABULARY) is None


def test_every_entry_of_an_auto_map_is_local() -> None:
    auto_map = {
        "AutoModelForCausalLM": "other/repo--modeling_tiny.Tiny",
        "AutoTokenizer": ["other/repo--tokenization_tiny.TinyTokenizer", None],
    }
    assert edit({"auto_map": auto_map})["auto_map"] == {
        "AutoModelForCausalLM": "modeling_tiny.Tiny",
        "AutoTokenizer": ["tokenization_tiny.TinyTokenizer", None],
    }


@pytest.mark.parametrize("value", ["LlamaForCausalLM", {"a": 1}, 3, [None]])
def test_architectures_that_are_no_list_of_names_are_refused(value: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": value}))
    with pytest.raises(CheckpointError, match="architectures"):
        read_config(tmp_path)


def test_a_quantized_or_missing_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"bits": 4}}))
    with pytest.raises(RefusedError, match="quantized"):
        read_config(tmp_path)


def test_any_string_of_json_can_be_written_again() -> None:
    value = {"note": "\ud800 naïve 模型"}
    assert json.loads(dump_json(value)) == value
