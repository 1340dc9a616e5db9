"""Architectures, compared with real models: what transformers saves is the truth about names, shapes and bytes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from exporter.architecture import account, ask_architecture
from exporter.checkpoints.safetensors_file import read_safetensors_file
from exporter.errors import CheckpointError, RefusedError
from exporter.tensors import DType, LazyTensor, SourceFiles

SMALL = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
HEADS = {**SMALL, "num_key_value_heads": 1}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {**HEADS, "tie_word_embeddings": False}),
    "llama tied": ("LlamaForCausalLM", {**HEADS, "tie_word_embeddings": True}),
    "falcon": ("FalconForCausalLM", {**SMALL, "num_ln_in_parallel_attn": None}),
    "gpt-neox": ("GPTNeoXForCausalLM", SMALL),
    "gpt-neox tied": ("GPTNeoXForCausalLM", {**SMALL, "tie_word_embeddings": True}),
    "gpt-2": ("GPT2LMHeadModel", {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}),
    "mixtral": ("MixtralForCausalLM", {**HEADS, "num_local_experts": 4}),
    "qwen2-moe": ("Qwen2MoeForCausalLM", {**HEADS, **EXPERTS, "shared_expert_intermediate_size": 24}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", {**HEADS, **EXPERTS, "head_dim": 8}),
    "deepseek-v3": ("DeepseekV3ForCausalLM", {**SMALL, "moe_intermediate_size": 24, "n_routed_experts": 4,
                                              "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "q_lora_rank": 8,
                                              "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
                                              "v_head_dim": 8, "first_k_dense_replace": 1}),
    "t5": ("T5ForConditionalGeneration", {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2,
                                          "num_heads": 2}),
    "classifier": ("LlamaForSequenceClassification", {**HEADS, "num_labels": 3}),
    "bert": ("BertForSequenceClassification", {**SMALL, "max_position_embeddings": 32}),
    "nomic-bert, fused in files": ("NomicBertForSequenceClassification", SMALL),
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model with random weights, and the folder that save_pretrained made of it."""
    folder = tmp_path_factory.mktemp("saved")
    return save(*MODELS[request.param], folder), folder


def save(class_name: str, settings: Mapping[str, Any], folder: Path) -> Any:
    torch.manual_seed(0)
    model_class = getattr(transformers, class_name)
    model = model_class(model_class.config_class(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(folder)
    return model


def config_of(folder: Path, **changes: Any) -> dict[str, Any]:
    return {**json.loads((folder / "config.json").read_text()), **changes}


def ask(config: Mapping[str, Any], code: Mapping[str, bytes] | None = None, *, trust: bool = False) -> Any:
    return ask_architecture(config, code or {}, trust_remote_code=trust)


def stored(tensors: Mapping[str, torch.Tensor], folder: Path) -> Mapping[str, LazyTensor]:
    """``tensors`` as lazy tensors, as a checkpoint yields them."""
    path = folder / "stored.safetensors"
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path)
    return read_safetensors_file(path)


def read(tensor: LazyTensor) -> torch.Tensor:
    with SourceFiles() as files:
        return torch.cat([block.clone() for block in tensor.blocks(files)]).reshape(tensor.shape)


def require_same(weights: Mapping[str, LazyTensor], truth: Mapping[str, torch.Tensor]) -> None:
    assert weights.keys() == truth.keys()
    for name, tensor in weights.items():
        assert torch.equal(read(tensor), truth[name]), name


# Names, shapes and bytes


def test_weights_named_as_in_memory_become_what_save_pretrained_writes(saved: Any, tmp_path: Path) -> None:
    model, folder = saved
    tensors = stored(model.state_dict(), tmp_path)
    matched = account(ask(config_of(folder)), tensors, {})
    require_same(matched.weights, load_file(folder / "model.safetensors"))


def test_weights_named_as_in_files_stay_as_they_are(saved: Any, tmp_path: Path) -> None:
    _, folder = saved
    matched = account(ask(config_of(folder)), read_safetensors_file(folder / "model.safetensors"), {})
    require_same(matched.weights, load_file(folder / "model.safetensors"))
    assert not matched.dropped


def test_from_pretrained_finds_every_weight_of_the_account(saved: Any, tmp_path: Path) -> None:
    model, folder = saved
    matched = account(ask(config_of(folder)), stored(model.state_dict(), tmp_path), {})
    exported = tmp_path / "exported"
    exported.mkdir()
    (exported / "config.json").write_text((folder / "config.json").read_text())
    save_file({name: read(tensor) for name, tensor in matched.weights.items()}, exported / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    loaded, info = type(model).from_pretrained(exported, output_loading_info=True)
    assert not any(info.values()), info
    truth = model.state_dict()
    assert all(torch.equal(tensor, truth[name]) for name, tensor in loaded.state_dict().items())


def test_weights_keep_the_order_of_the_model(tmp_path: Path) -> None:
    model = save(*MODELS["mixtral"], tmp_path)
    names = list(account(ask(config_of(tmp_path)), stored(model.state_dict(), tmp_path), {}).weights)
    assert names.index("model.layers.0.block_sparse_moe.experts.0.w1.weight") < names.index(
        "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    )
    assert (names[0], names[-1]) == ("model.embed_tokens.weight", "lm_head.weight")
    layers = [int(name.split(".")[2]) for name in names if ".layers." in name]
    assert layers == sorted(layers)


def test_experts_are_cut_out_of_the_fused_tensor_without_reading_it(tmp_path: Path) -> None:
    model = save(*MODELS["mixtral"], tmp_path)
    tensors = stored(model.state_dict(), tmp_path)
    (tmp_path / "stored.safetensors").unlink()
    weights = account(ask(config_of(tmp_path)), tensors, {}).weights
    expert = weights["model.layers.1.block_sparse_moe.experts.3.w3.weight"]
    fused = tensors["model.layers.1.mlp.experts.gate_up_proj"]
    assert [extent.path for extent in expert.extents] == [tmp_path / "stored.safetensors"]
    assert expert.extents[0].offset == fused.extents[0].offset + (3 * 48 + 24) * 16 * 4


# Names that a checkpoint may have instead


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "base_model.model."])
def test_prefixes_of_wrappers_are_stripped(prefix: str, tmp_path: Path) -> None:
    model = save(*MODELS["llama"], tmp_path)
    wrapped = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    matched = account(ask(config_of(tmp_path)), stored(wrapped, tmp_path), {})
    require_same(matched.weights, model.state_dict())


def test_a_layer_that_was_wrapped_alone_is_found(tmp_path: Path) -> None:
    model = save(*MODELS["llama"], tmp_path)
    wrapped = {
        name.replace(".1.", ".1._checkpoint_wrapped_module."): value for name, value in model.state_dict().items()
    }
    matched = account(ask(config_of(tmp_path)), stored(wrapped, tmp_path), {})
    require_same(matched.weights, model.state_dict())


@pytest.mark.parametrize(
    "name", ["model.layers.0.attn.bias", "model.layers.0.attn.masked_bias", "model.rotary_emb.inv_freq"]
)
@pytest.mark.parametrize("shape", [(4, 16), (1, 1, 8, 4)])
def test_a_weight_with_the_name_of_a_computed_buffer_is_not_dropped(
    name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    state = save(*MODELS["llama"], tmp_path).state_dict() | {name: torch.ones(shape)}
    with pytest.raises(CheckpointError, match="1 unexpected"):
        account(ask(config_of(tmp_path)), stored(state, tmp_path), {})


def test_a_checkpoints_own_ties_are_found_behind_a_wrappers_prefix(tmp_path: Path) -> None:
    model = save(*MODELS["llama"], tmp_path)
    state = {"module." + name: tensor for name, tensor in model.state_dict().items()}
    embedding = state["module.model.embed_tokens.weight"]
    del state["module.lm_head.weight"]
    aliases = {"module.lm_head.weight": "module.model.embed_tokens.weight"}
    matched = account(ask(config_of(tmp_path)), stored(state, tmp_path), aliases)
    assert torch.equal(read(matched.weights["lm_head.weight"]), embedding)
    assert torch.equal(read(matched.weights["model.embed_tokens.weight"]), embedding)


def test_files_of_the_base_model_get_its_prefix(tmp_path: Path) -> None:
    model = save(*MODELS["gpt-2"], tmp_path)
    matched = account(ask(config_of(tmp_path)), stored(model.transformer.state_dict(), tmp_path), {})
    require_same(matched.weights, load_file(tmp_path / "model.safetensors"))


def test_files_of_a_base_model_with_experts_get_its_prefix(tmp_path: Path) -> None:
    class_name, settings = MODELS["mixtral"]
    model = save(class_name, {**settings, "tie_word_embeddings": True}, tmp_path)
    model.model.save_pretrained(tmp_path / "base")
    base = read_safetensors_file(tmp_path / "base" / "model.safetensors")
    assert "layers.0.block_sparse_moe.experts.0.w1.weight" in base
    require_same(account(ask(config_of(tmp_path)), base, {}).weights, load_file(tmp_path / "model.safetensors"))


def test_files_of_a_model_with_a_head_lose_the_base_models_prefix(tmp_path: Path) -> None:
    model = save(*MODELS["gpt-2"], tmp_path)
    state = {f"transformer.{name}": tensor for name, tensor in model.transformer.state_dict().items()}
    matched = account(ask(config_of(tmp_path, architectures=["GPT2Model"])), stored(state, tmp_path), {})
    require_same(matched.weights, model.transformer.state_dict())


def test_names_of_older_versions_are_read(tmp_path: Path) -> None:
    model = save(*MODELS["bert"], tmp_path)
    truth = load_file(tmp_path / "model.safetensors")
    older = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in model.state_dict().items()
    }
    assert older.keys() != truth.keys()
    require_same(account(ask(config_of(tmp_path)), stored(older, tmp_path), {}).weights, truth)


def test_two_tensors_that_would_get_one_name_are_not_made_one(tmp_path: Path) -> None:
    model = save(*MODELS["bert"], tmp_path)
    state = model.state_dict()
    state["bert.embeddings.LayerNorm.gamma"] = torch.zeros(16)
    with pytest.raises(CheckpointError, match=r"unexpected \(bert.embeddings.LayerNorm.gamma\)"):
        account(ask(config_of(tmp_path)), stored(state, tmp_path), {})


def test_buffers_that_are_computed_are_dropped_with_a_reason(tmp_path: Path) -> None:
    model = save(*MODELS["bert"], tmp_path)
    state = model.state_dict() | {"bert.embeddings.position_ids": torch.arange(32)[None]}
    matched = account(ask(config_of(tmp_path)), stored(state, tmp_path), {})
    assert matched.dropped == {"bert.embeddings.position_ids": "non-persistent buffer"}


def test_causal_masks_and_rotary_frequencies_of_old_checkpoints_are_dropped(tmp_path: Path) -> None:
    model = save(*MODELS["gpt-neox"], tmp_path)
    state = model.state_dict() | {
        "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
        "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(4),
    }
    matched = account(ask(config_of(tmp_path)), stored(state, tmp_path), {})
    assert len(matched.dropped) == 3
    require_same(matched.weights, load_file(tmp_path / "model.safetensors"))


# Ties


def test_a_tied_alias_is_dropped_and_its_value_handed_on(tmp_path: Path) -> None:
    model = save(*MODELS["llama tied"], tmp_path)
    tensors = stored(model.state_dict(), tmp_path)
    matched = account(ask(config_of(tmp_path)), tensors, {})
    assert matched.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert matched.dropped == {"lm_head.weight": "tied to model.embed_tokens.weight"}
    assert matched.tied_values == {"lm_head.weight": (tensors["lm_head.weight"], "model.embed_tokens.weight")}


@pytest.mark.parametrize("model_name", ["llama tied", "gpt-neox tied", "gpt-2", "t5"])
def test_a_file_that_holds_only_the_alias_is_read_as_the_stored_name(model_name: str, tmp_path: Path) -> None:
    model = save(*MODELS[model_name], tmp_path)
    truth = load_file(tmp_path / "model.safetensors")
    architecture = ask(config_of(tmp_path))
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in architecture.tied.values()}
    require_same(account(architecture, stored(state, tmp_path), {}).weights, truth)


def test_a_tied_head_under_its_name_on_disk_is_known_as_tied(tmp_path: Path) -> None:
    model = save(*MODELS["gpt-neox tied"], tmp_path)
    state = load_file(tmp_path / "model.safetensors") | {"embed_out.weight": model.lm_head.weight.detach()}
    matched = account(ask(config_of(tmp_path)), stored(state, tmp_path), {})
    assert matched.dropped == {"embed_out.weight": "tied to gpt_neox.embed_in.weight"}


def test_every_shared_parameter_of_a_model_is_known_as_tied(saved: Any) -> None:
    model, folder = saved
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    architecture = ask(config_of(folder))
    shared = set().union(*(group for group in names.values() if len(group) > 1))
    assert architecture.tied.keys() | set(architecture.tied.values()) == shared


def test_the_input_embedding_is_named_as_on_disk(saved: Any) -> None:
    model, folder = saved
    name = ask(config_of(folder)).input_embedding
    assert torch.equal(load_file(folder / "model.safetensors")[name], model.get_input_embeddings().weight)


# What does not fit


def test_missing_unexpected_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    state = save(*MODELS["llama"], tmp_path).state_dict()
    state["model.norm.scale"] = state.pop("model.norm.weight")
    state["lm_head.weight"] = torch.zeros(80, 16)
    with pytest.raises(CheckpointError) as caught:
        account(ask(config_of(tmp_path)), stored(state, tmp_path), {})
    assert "1 missing (model.norm.weight)" in caught.value.message
    assert "1 unexpected (model.norm.scale)" in caught.value.message
    assert "lm_head.weight [80, 16], expected [64, 16]" in caught.value.message


def test_a_fused_tensor_of_another_shape_is_named_as_it_is_in_the_checkpoint(tmp_path: Path) -> None:
    state = save(*MODELS["mixtral"], tmp_path).state_dict()
    state["model.layers.0.mlp.experts.down_proj"] = torch.zeros(3, 16, 24)
    with pytest.raises(CheckpointError, match=r"down_proj \[3, 16, 24\], expected \[4, 16, 24\]"):
        account(ask(config_of(tmp_path)), stored(state, tmp_path), {})


def test_a_missing_fused_tensor_is_missing(tmp_path: Path) -> None:
    state = save(*MODELS["mixtral"], tmp_path).state_dict()
    del state["model.layers.0.mlp.experts.gate_up_proj"]
    with pytest.raises(CheckpointError, match=r"1 missing \(model.layers.0.mlp.experts.gate_up_proj\)"):
        account(ask(config_of(tmp_path)), stored(state, tmp_path), {})


def test_a_checkpoint_without_tensors_is_not_complete(tmp_path: Path) -> None:
    save(*MODELS["llama"], tmp_path)
    with pytest.raises(CheckpointError, match="missing"):
        account(ask(config_of(tmp_path)), {}, {})


def test_every_conversion_that_only_moves_elements_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's own operations, on tensors with values and on the meta device."""
    from transformers import core_model_loading as library

    model = save(*MODELS["mixtral"], tmp_path)

    def reverted(model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        query, key = (state[f"model.layers.0.self_attn.{name}_proj.weight"] for name in ("q", "k"))
        experts = state["model.layers.0.mlp.experts.gate_up_proj"]
        apart = [experts[number] for number in range(4)]
        run = {"config": model.config, "model": model, "full_layer_name": ""}
        return {
            **library.PermuteForRope(inverse=True).convert({"x": [query]}, ["x"], ["permuted"], **run),
            **library.Transpose().convert({"x": query}, ["x"], ["transposed"]),
            **library.Interleave().convert({"x": query}, ["x"], ["interleaved"]),
            **library.Concatenate(dim=0).convert({"x": query, "y": key}, ["x", "y"], ["rows"]),
            **library.Concatenate(dim=1).convert({"x": query, "y": query.T}, ["x", "y"], ["columns"]),
            **library.Chunk(dim=-1).convert({"x": experts}, ["x"], ["left", "right"]),
            **library.MergeModulelist(dim=1).convert({"x": apart}, ["x"], ["stacked"]),
            **library.SplitModulelist(dim=1).convert({"x": experts}, ["x"], ["apart.*"]),
        }

    monkeypatch.setattr(library, "revert_weight_conversion", reverted)
    state = model.state_dict()
    architecture = ask(config_of(tmp_path))
    assert len(architecture.disk) == 56
    require_same(account(architecture, stored(state, tmp_path), {}).weights, reverted(model, state))


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight * 2,
        lambda weight: weight.mul_(2),
        lambda weight: weight[1:].neg_(),
        lambda weight: torch.cat([weight * 2, weight]),
        lambda weight: weight.T.clone(),  # keeps its strides: its elements do not lie row by row
        lambda weight: weight[torch.tensor([1, 0])],
    ],
)
def test_a_change_that_is_not_a_plain_copy_has_no_way_back(
    change: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(*MODELS["llama"], tmp_path)
    monkeypatch.setattr(
        "transformers.core_model_loading.revert_weight_conversion",
        lambda model, state: {**state, "changed": change(state["lm_head.weight"])},
    )
    with pytest.raises(RefusedError, match="is stored in another form"):
        ask(config_of(tmp_path))


def test_a_conversion_that_the_library_cannot_reverse_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.core_model_loading import MergeModulelist

    save(*MODELS["mixtral"], tmp_path)
    monkeypatch.setattr(MergeModulelist, "reverse_op", property(lambda self: super(MergeModulelist, self).reverse_op))
    with pytest.raises(RefusedError, match="MixtralForCausalLM"):
        ask(config_of(tmp_path))


# fp32


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16])
def test_what_from_pretrained_loads_in_fp32_is_kept_in_fp32(saved: Any, dtype: DType) -> None:
    model, folder = saved
    architecture = ask(config_of(folder))
    loaded = type(model).from_pretrained(folder, dtype=dtype.torch).state_dict()
    for name, origin in architecture.disk.items():
        assert architecture.keeps_fp32(name, dtype) == (loaded[origin.name].dtype is torch.float32), name


def test_t5_keeps_its_output_projections_in_fp32_under_fp16(tmp_path: Path) -> None:
    save(*MODELS["t5"], tmp_path)
    architecture = ask(config_of(tmp_path))
    kept = [name for name in architecture.disk if architecture.keeps_fp32(name, DType.F16)]
    assert len(kept) == 4
    assert all(name.endswith("DenseReluDense.wo.weight") for name in kept)


# Custom code

CODE = """
from pathlib import Path
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

Path({canary!r}).write_text("imported")
print("printed on import")


class OwnConfig(PretrainedConfig):
    model_type = "own-model"

    def __init__(self, vocab_size=32, failing=False, **kwargs):
        self.vocab_size, self.failing = vocab_size, failing
        super().__init__(**kwargs)


class OwnForCausalLM(PreTrainedModel):
    config_class = OwnConfig
    _keep_in_fp32_modules_strict = ["gat"]

    def __init__(self, config):
        super().__init__(config)
        if config.failing:
            {failure}
        self.embed = nn.Embedding(config.vocab_size, 8)
        self.gate = nn.Linear(8, 8)
        self.decay = nn.Parameter(torch.zeros(8, dtype=torch.float32))
        self.register_buffer("count", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("mask", torch.ones(4), persistent=False)
        self.post_init()
"""

OWN = {
    "model_type": "own-model",
    "architectures": ["OwnForCausalLM"],
    "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
}


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, bytes]]:
    """The code of a model of its own, which leaves a canary when it is imported; modules are cached in a new folder."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)

    def make(failure: str = "raise RuntimeError('no')") -> dict[str, bytes]:
        return {"own.py": CODE.format(canary=str(tmp_path / "canary"), failure=failure).encode()}

    return make


def test_custom_code_is_refused_without_the_flag_and_not_imported(own_code: Any, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="own code") as caught:
        ask(OWN, own_code())
    assert "--trust_remote_code" in caught.value.hint
    assert not (tmp_path / "canary").exists()


def test_custom_code_is_asked_with_the_flag(own_code: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    architecture = ask(OWN, own_code(), trust=True)
    assert (tmp_path / "canary").exists()
    assert architecture.class_name == "OwnForCausalLM"
    assert set(architecture.disk) == {"decay", "embed.weight", "gate.weight", "gate.bias", "count"}
    assert architecture.transient == {"mask": (4,)}
    assert "printed" not in capsys.readouterr().out


def test_a_parameter_that_custom_code_makes_in_fp32_is_kept_in_fp32(own_code: Any) -> None:
    architecture = ask(OWN, own_code(), trust=True)
    kept = {name for name in architecture.disk if architecture.keeps_fp32(name, DType.BF16)}
    assert kept == {"decay", "gate.weight", "gate.bias"}


def test_custom_code_of_another_repository_is_looked_up_in_the_folder(own_code: Any) -> None:
    auto_map = {key: f"someone/elsewhere--{entry}" for key, entry in OWN["auto_map"].items()}
    assert ask({**OWN, "auto_map": auto_map}, own_code(), trust=True).class_name == "OwnForCausalLM"


@pytest.mark.parametrize("failure", ["raise RuntimeError('no')", "raise SystemExit(0)", "torch.zeros(1).item()"])
def test_a_failure_of_custom_code_is_one_line(failure: str, own_code: Any) -> None:
    with pytest.raises(CheckpointError, match="OwnForCausalLM") as caught:
        ask({**OWN, "failing": True}, own_code(failure), trust=True)
    assert "\n" not in caught.value.message


def test_custom_code_that_cannot_be_imported_says_so_without_local_paths(own_code: Any) -> None:
    with pytest.raises(CheckpointError) as caught:
        ask(OWN, {"own.py": b"import a_module_that_nobody_has\n"}, trust=True)
    assert "a_module_that_nobody_has" in caught.value.message
    with pytest.raises(CheckpointError) as caught:
        ask(OWN, {}, trust=True)
    assert "own.py" in caught.value.message
    assert "/" not in caught.value.message


@pytest.mark.parametrize("trust", [False, True])
def test_a_class_that_transformers_has_too_is_asked_where_the_own_code_may_not_or_does_not_run(
    trust: bool, own_code: Any, tmp_path: Path
) -> None:
    save(*MODELS["falcon"], tmp_path / "falcon")
    auto_map = {"AutoConfig": "old.FalconConfig", "AutoModelForCausalLM": "old.FalconForCausalLM"}
    code = {"old.py": b"from transformers import a_name_of_version_4\n"}
    architecture = ask(config_of(tmp_path / "falcon", auto_map=auto_map), code, trust=trust)
    assert architecture.disk.keys() == load_file(tmp_path / "falcon" / "model.safetensors").keys()


# Configs


def test_a_config_without_architectures_means_the_causal_model(tmp_path: Path) -> None:
    save(*MODELS["llama"], tmp_path)
    config = config_of(tmp_path)
    del config["architectures"]
    assert ask(config).class_name == "LlamaForCausalLM"


def test_the_vocabulary_of_the_config_decides_the_rows(tmp_path: Path) -> None:
    save(*MODELS["llama"], tmp_path)
    architecture = ask(config_of(tmp_path, vocab_size=80))
    assert architecture.disk["lm_head.weight"].shape == (80, 16)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"model_type": "nobody-knows-it"}, RefusedError),
        ({"architectures": ["NobodyKnowsItForCausalLM"]}, RefusedError),
        ({"architectures": ["pipeline"]}, RefusedError),
        ({"architectures": ["LlamaConfig"]}, RefusedError),
        ({"architectures": "LlamaForCausalLM"}, CheckpointError),
        ({"architectures": [{}]}, CheckpointError),
        ({"model_type": None}, CheckpointError),
        ({"model_type": ["llama"]}, CheckpointError),
        ({"hidden_size": "sixteen"}, CheckpointError),
        ({"hidden_size": -16}, CheckpointError),
        ({"num_attention_heads": 0}, CheckpointError),
        ({"auto_map": "own.OwnForCausalLM", "model_type": "own-model"}, RefusedError),
        ({"auto_map": {"AutoConfig": None, "AutoModel": ["x.Y", None]}, "model_type": "own-model"}, RefusedError),
    ],
)
def test_a_broken_or_unknown_config_is_said_in_one_line(
    changes: dict[str, Any], error: type[Exception], tmp_path: Path
) -> None:
    save(*MODELS["llama"], tmp_path)
    with pytest.raises(error) as caught:
        ask(config_of(tmp_path, **changes))
    assert type(caught.value) is error
    assert "\n" not in caught.value.message
    assert str(tmp_path) not in caught.value.message


def test_a_number_of_layers_that_fills_the_memory_of_a_config_is_refused(tmp_path: Path) -> None:
    save(*MODELS["qwen3-moe"], tmp_path)
    with pytest.raises(CheckpointError, match="num_hidden_layers 2000000000, expected at most"):
        ask(config_of(tmp_path, num_hidden_layers=2 * 10**9))


@pytest.mark.parametrize("auto_map", ["AutoConfig", ["AutoConfig"], {"AutoConfig": None}])
def test_a_broken_auto_map_does_not_matter_where_transformers_has_the_class(auto_map: Any, tmp_path: Path) -> None:
    save(*MODELS["llama"], tmp_path)
    assert ask(config_of(tmp_path, auto_map=auto_map), trust=True).class_name == "LlamaForCausalLM"


def test_a_model_of_endless_layers_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(*MODELS["llama"], tmp_path)
    monkeypatch.setattr("exporter.architecture.model._MOST_PARAMETERS", 100)
    with pytest.raises(CheckpointError, match="over 100 weights"):
        ask(config_of(tmp_path, num_hidden_layers=1000))
    assert ask(config_of(tmp_path)).class_name == "LlamaForCausalLM"


def test_asking_leaves_torch_as_it_was(tmp_path: Path) -> None:
    save(*MODELS["llama"], tmp_path)
    ask(config_of(tmp_path))
    with pytest.raises(CheckpointError):
        ask(config_of(tmp_path, hidden_size=-16))
    assert torch.get_default_dtype() is torch.float32
    assert torch.empty(1).device.type == "cpu"
    torch.nn.Linear(1, 1)
