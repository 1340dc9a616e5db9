"""What the exporter takes for a model's files is what save_pretrained writes and what from_pretrained loads."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from exporter.architecture import Architecture, account, ask_architecture
from exporter.architecture.model import _uninitialized
from exporter.errors import CheckpointError, RefusedError
from exporter.tensors import DType, Extent, LazyTensor, SourceFiles, StoredTensor

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": 40,
    "pad_token_id": 0,
}
SIZES_MHA = SIZES | {"num_key_value_heads": 4}
GPT_SIZES = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 40}
SHORT_SIZES = {key: SIZES[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
TOWER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
T5_SIZES = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "vocab_size": 40}

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", SIZES),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", SIZES | {"tie_word_embeddings": True}),
    "llama-classifier": ("LlamaForSequenceClassification", "LlamaConfig", SIZES | {"num_labels": 1}),
    "falcon": ("FalconForCausalLM", "FalconConfig", SHORT_SIZES),
    "neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SHORT_SIZES | {"intermediate_size": 24}),
    "neox-tied": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        SHORT_SIZES | {"intermediate_size": 24, "tie_word_embeddings": True},
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT_SIZES),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", SIZES | {"num_local_experts": 4}),
    "mixtral-tied": (
        "MixtralForCausalLM",
        "MixtralConfig",
        SIZES | {"num_local_experts": 4, "tie_word_embeddings": True},
    ),
    "qwen2-moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", SIZES | EXPERTS | {"shared_expert_intermediate_size": 20}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", SIZES | EXPERTS),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", SIZES_MHA | {"num_experts": 4, "num_experts_per_tok": 2}),
    "deepseek-v2": (
        "DeepseekV2ForCausalLM",
        "DeepseekV2Config",
        SIZES_MHA | MLA | {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
    ),
    "xlnet": (
        "XLNetLMHeadModel",
        "XLNetConfig",
        {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16, "vocab_size": 40},
    ),
    "phi": ("PhiForCausalLM", "PhiConfig", SIZES_MHA),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", SIZES),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        SHORT_SIZES | {"ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 32},
    ),
    "bloom": ("BloomForCausalLM", "BloomConfig", {"hidden_size": 16, "n_layer": 2, "n_head": 4, "vocab_size": 40}),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5_SIZES),
    "t5-untied": ("T5ForConditionalGeneration", "T5Config", T5_SIZES | {"tie_word_embeddings": False}),
    "gemma3-with-vision": (
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {"text_config": SIZES, "vision_config": TOWER | {"image_size": 28, "patch_size": 14}, "mm_tokens_per_image": 4},
    ),
}


@dataclass(frozen=True)
class Saved:
    """A real model: its state dict in memory and its file on disk, as lazy tensors, and what from_pretrained says."""

    name: str
    folder: Path
    architecture: Architecture
    memory: Mapping[str, LazyTensor]
    disk: Mapping[str, LazyTensor]
    tied: tuple[str, ...]

    @property
    def truth(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "model.safetensors")


def store(path: Path, state: Mapping[str, torch.Tensor]) -> dict[str, LazyTensor]:
    """The tensors in a plain file, one after the other."""
    names = {dtype.torch: dtype for dtype in DType}
    stored: dict[str, LazyTensor] = {}
    with path.open("wb") as file:
        for name, tensor in state.items():
            dtype, start = names[tensor.dtype], file.tell()
            file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            stored[name] = StoredTensor(tuple(tensor.shape), dtype, (Extent(path, start, dtype, tensor.numel()),))
    return stored


def read(tensor: LazyTensor) -> torch.Tensor:
    with SourceFiles() as files:
        return torch.cat([block.clone() for block in tensor.blocks(files)]).reshape(tensor.shape)


def ask(config: Mapping[str, Any]) -> Architecture:
    return ask_architecture(config, {}, trust_remote_code=False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    """A tiny model of the family, saved once for all tests."""
    made: dict[str, Saved] = {}

    def save(name: str) -> Saved:
        if name not in made:
            class_name, config_name, sizes = MODELS[name]
            torch.manual_seed(0)
            model = getattr(transformers, class_name)(getattr(transformers, config_name)(**sizes))
            for parameter in model.parameters():
                parameter.data = torch.randn(parameter.shape)
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            state = model.state_dict()
            places: dict[int, list[str]] = {}
            for key, tensor in state.items():
                places.setdefault(tensor.data_ptr(), []).append(key)
            made[name] = Saved(
                name,
                folder,
                ask(json.loads((folder / "config.json").read_text())),
                store(folder / "memory.bin", state),
                store(folder / "disk.bin", load_file(folder / "model.safetensors")),
                max(map(tuple, places.values()), key=len),
            )
        return made[name]

    return save


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, saved: Callable[[str], Saved]) -> Saved:
    return saved(request.param)


def assert_saves(model: Saved, tensors: Mapping[str, LazyTensor], aliases: Mapping[str, str] | None = None) -> None:
    """``tensors`` are written as save_pretrained wrote the model."""
    found, truth = account(model.architecture, tensors, aliases or {}).weights, model.truth
    assert found.keys() == truth.keys()
    for name, value in truth.items():
        assert found[name].shape == value.shape, name
        assert torch.equal(read(found[name]), value), name


def test_names_in_memory_become_what_save_pretrained_writes(model: Saved) -> None:
    assert_saves(model, model.memory)


def test_names_on_disk_stay(model: Saved) -> None:
    assert_saves(model, model.disk)


def test_names_that_fit_are_not_tried_in_other_ways(saved: Callable[[str], Saved]) -> None:
    model = saved("llama")
    assert not model.architecture.tied
    settled = replace(model.architecture, renamed=lambda name: pytest.fail(f"{name} was renamed"))
    assert account(settled, model.memory, {}).weights.keys() == model.truth.keys()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_forward_module.module."])
def test_what_wrappers_put_before_names_is_taken_off(prefix: str, model: Saved) -> None:
    assert_saves(model, {prefix + name: tensor for name, tensor in model.memory.items()})
    assert_saves(model, {prefix + name: tensor for name, tensor in model.disk.items()})


def test_a_layer_that_was_compiled_or_wrapped_alone_is_found(saved: Callable[[str], Saved]) -> None:
    model = saved("llama")
    for wrapper in ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"):
        tensors = {name.replace("layers.1.", f"layers.1.{wrapper}."): part for name, part in model.memory.items()}
        assert tensors.keys() != model.memory.keys()
        assert_saves(model, tensors)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "neox-tied", "mixtral-tied", "t5", "opt", "gemma3-with-vision"])
def test_any_one_name_of_a_tied_weight_is_enough(name: str, saved: Callable[[str], Saved]) -> None:
    model = saved(name)
    assert len(model.tied) > 1
    for kept in model.tied:
        one = {name: part for name, part in model.memory.items() if name == kept or name not in model.tied}
        assert_saves(model, one)
        aliases = {alias: kept for alias in model.tied if alias != kept}
        assert_saves(model, one, aliases)
        assert_saves(
            model,
            {f"module.{name}": part for name, part in one.items()},
            {f"module.{alias}": f"module.{name}" for alias, name in aliases.items()},
        )
    with pytest.raises(CheckpointError, match="1 missing"):
        account(model.architecture, {n: part for n, part in model.memory.items() if n not in model.tied}, {})


@pytest.mark.parametrize(
    ("name", "alias", "stored"),
    [
        ("neox-tied", "embed_out.weight", "gpt_neox.embed_in.weight"),
        ("mixtral-tied", "lm_head.weight", "model.embed_tokens.weight"),
    ],
)
def test_a_file_may_hold_a_tied_weight_under_its_other_name(
    name: str, alias: str, stored: str, saved: Callable[[str], Saved]
) -> None:
    model = saved(name)
    both = {**model.disk, alias: model.disk[stored]}
    assert_saves(model, both)
    assert_saves(model, {name: part for name, part in both.items() if name != stored})


def test_a_tie_of_the_checkpoint_that_the_config_does_not_know_is_stored_twice(saved: Callable[[str], Saved]) -> None:
    model = saved("llama")
    for prefix in ("", "module."):
        tensors = {prefix + name: part for name, part in model.memory.items() if name != "lm_head.weight"}
        embedding = f"{prefix}model.embed_tokens.weight"
        found = account(model.architecture, tensors, {f"{prefix}lm_head.weight": embedding})
        assert found.weights["lm_head.weight"] is found.weights["model.embed_tokens.weight"] is tensors[embedding]


def test_values_under_tied_names_are_handed_on_to_be_compared(saved: Callable[[str], Saved]) -> None:
    model = saved("llama-tied")
    found = account(model.architecture, model.memory, {})
    assert found.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert found.tied_values == {"lm_head.weight": (model.memory["lm_head.weight"], "model.embed_tokens.weight")}
    assert found.dropped == {"lm_head.weight": "tied to model.embed_tokens.weight"}


@pytest.mark.parametrize(("name", "prefix"), [("gpt2", "transformer."), ("bloom", "transformer.")])
def test_files_of_the_base_model_lack_its_prefix(name: str, prefix: str, saved: Callable[[str], Saved]) -> None:
    model = saved(name)
    bare = {name.removeprefix(prefix): part for name, part in model.disk.items()}
    assert bare.keys() != model.disk.keys()
    assert_saves(model, bare)


def test_a_base_model_in_the_place_of_a_model_with_a_head_is_incomplete(saved: Callable[[str], Saved]) -> None:
    model = saved("llama")
    bare = {name.removeprefix("model."): part for name, part in model.disk.items() if name.startswith("model.")}
    with pytest.raises(CheckpointError, match=r"1 missing \(lm_head\.weight\)"):
        account(model.architecture, bare, {})


def test_what_is_missing_left_over_or_of_another_shape_is_named(model: Saved) -> None:
    victim = next(name for name in model.memory if name.endswith("weight") and name not in model.tied)
    part = model.memory[victim]
    with pytest.raises(CheckpointError, match=r"missing \("):
        account(model.architecture, {name: part for name, part in model.memory.items() if name != victim}, {})
    with pytest.raises(CheckpointError, match=r"1 unexpected \(adapter\.weight\)"):
        account(model.architecture, {**model.memory, "adapter.weight": part}, {})
    with pytest.raises(CheckpointError, match="of another shape"):
        account(model.architecture, {**model.memory, victim: StoredTensor((3, 5), DType.F32, ())}, {})


def test_two_tensors_that_mean_one_weight_are_refused(saved: Callable[[str], Saved]) -> None:
    model = saved("gemma3-with-vision")
    twice = {**model.disk, "model.language_model.norm.weight": model.disk["language_model.model.norm.weight"]}
    assert len(twice) == len(model.disk) + 1
    with pytest.raises(CheckpointError, match=r"1 unexpected \(model\.language_model\.norm\.weight\)"):
        account(model.architecture, twice, {})


def test_buffers_that_old_versions_saved_are_dropped_and_weights_of_the_same_name_are_not(
    saved: Callable[[str], Saved],
) -> None:
    model, layer = saved("neox"), "gpt_neox.layers.0.attention."
    shapes: dict[str, tuple[int, ...]] = {"bias": (1, 1, 8, 8), "masked_bias": (), "rotary_emb.inv_freq": (2,)}
    old = {layer + name: StoredTensor(shape, DType.F32, ()) for name, shape in shapes.items()}
    assert account(model.architecture, {**model.disk, **old}, {}).dropped.keys() == old.keys()
    model = saved("llama")
    for name in ("model.layers.0.attn.bias", "model.layers.0.attn.masked_bias", "model.rotary_emb.inv_freq"):
        for shape in ((4, 16), (1, 1, 8, 4)):
            trained = {name: StoredTensor(shape, DType.F32, ())}
            with pytest.raises(CheckpointError, match=r"1 unexpected \(model\."):
                account(model.architecture, {**model.disk, **trained}, {})


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16, DType.F32])
def test_fp32_is_kept_where_from_pretrained_loads_fp32(dtype: DType, model: Saved) -> None:
    loaded = getattr(transformers, model.architecture.class_name).from_pretrained(model.folder, dtype=dtype.torch)
    kept = {name for name, tensor in loaded.state_dict().items() if tensor.dtype is torch.float32}
    for name, origin in model.architecture.disk.items():
        wanted = DType.F32 if origin.name in kept else dtype
        assert (DType.F32 if model.architecture.keeps_fp32(name, dtype) else dtype) is wanted, name


def test_the_families_above_have_weights_that_stay_fp32(saved: Callable[[str], Saved]) -> None:
    t5, xlnet = saved("t5").architecture, saved("xlnet").architecture
    wo = "encoder.block.0.layer.1.DenseReluDense.wo.weight"
    assert (t5.keeps_fp32(wo, DType.F16), t5.keeps_fp32(wo, DType.BF16)) == (True, False)
    assert xlnet.keeps_fp32("transformer.layer.0.rel_attn.q", DType.BF16)


def test_tensors_without_values_are_not_initialized_and_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    with _uninitialized():
        assert torch.equal(torch.nn.init.constant_(torch.empty(3), 2.0), torch.full((3,), 2.0))
    for name in ("_no_grad_uniform_", "_no_grad_normal_"):
        monkeypatch.setattr(torch.nn.init, name, lambda *args: pytest.fail("a tensor was initialized"))
    assert ask(transformers.LlamaConfig(**SIZES).to_dict() | {"architectures": ["LlamaForCausalLM"]}).memory


def test_a_class_that_the_library_lacks_is_refused() -> None:
    config = transformers.GPT2Config(**GPT_SIZES).to_dict() | {"architectures": ["NoSuchModel"]}
    with pytest.raises(RefusedError, match="NoSuchModel"):
        ask(config)


@pytest.mark.parametrize("change", ["negate", "in place"])
def test_a_conversion_that_is_changes_values_is_refused(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def revert(model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        name = "model.layers.0.mlp.up_proj.weight"
        whole = state[name]
        changed = {
            "negate": lambda: -whole,
            "in place": lambda: whole.neg_(),
        }
        return state | {name: changed[change]()}

    monkeypatch.setattr("transformers.core_model_loading.revert_weight_conversion", revert)
    config = transformers.LlamaConfig(**SIZES).to_dict() | {"architectures": ["LlamaForCausalLM"]}
    with pytest.raises(RefusedError, match="no exact way back"):
        ask(config)
