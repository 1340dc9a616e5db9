"""The table of cases: which model is trained, by what, and how its checkpoint is written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Case:
    """One checkpoint folder.

    ``writer`` is who writes it: DeepSpeed's ``engine.save_checkpoint``, its pipeline engine, the Hugging Face Trainer
    on top of DeepSpeed, or ``save_pretrained`` and ``torch.save`` without DeepSpeed. ``deepspeed`` is laid over the
    DeepSpeed configuration, ``config`` over the model's; ``optimizer`` goes to AdamW besides the learning rate.
    ``frozen`` lists prefixes of parameter names that are not trained, and not in the save where it is
    ``without_frozen``. A model that is ``born_partitioned`` is built under ``zero.Init``. A ``universal`` checkpoint is
    made of the one that was saved. ``version`` is DeepSpeed's.
    """

    name: str
    model: str
    writer: Literal["engine", "pipeline", "trainer", "safetensors", "bin"] = "engine"
    zero_stage: int | None = None
    world_size: int = 2
    precision: Literal["fp32", "fp16", "bf16"] = "bf16"
    steps: int = 4
    learning_rate: float = 1e-2
    deepspeed: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=lambda: {"torch_adam": True})
    frozen: tuple[str, ...] = ()
    save_total_limit: int = 1
    max_shard_size: int | None = None
    without_optimizer: bool = False
    without_frozen: bool = False
    born_partitioned: bool = False
    universal: bool = False
    version: str = "0.19.8"


def _zero(**options: Any) -> dict[str, Any]:
    return {"zero_optimization": options}


_SGD = {
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    "zero_allow_untested_optimizer": True,
}
"""No state but the weights: small files."""

_TENSOR_PARALLEL = {"tensor_parallel": {"autotp_size": 2}, **_SGD}
_GROUPED_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}

_CASES = [
    Case("falcon-trainer-zero2", "falcon", "trainer", 2, steps=1000, learning_rate=1e-2, save_total_limit=2),
    Case("llama-zero1", "llama", zero_stage=1),
    Case("llama-zero2", "llama", zero_stage=2),
    Case("llama-zero3", "llama", zero_stage=3),
    Case("llama-trainer-zero3", "llama", "trainer", 3),
    Case(
        "llama-trainer-zero3-gathered",
        "llama",
        "trainer",
        3,
        deepspeed=_zero(stage3_gather_16bit_weights_on_model_save=True),
    ),
    Case("llama-tied-zero2", "llama", zero_stage=2, world_size=3, config={"tie_word_embeddings": True}),
    Case("llama-tied-zero3", "llama", zero_stage=3, world_size=3, config={"tie_word_embeddings": True}),
    Case("neox-zero2", "neox", zero_stage=2, precision="fp16"),
    Case("llama-frozen-zero2", "llama", zero_stage=2, frozen=("model.embed_tokens.", "model.layers.0.")),
    Case("llama-frozen-zero3", "llama", zero_stage=3, frozen=("model.embed_tokens.", "model.layers.0.")),
    Case("custom-zero2", "custom", zero_stage=2),
    Case("custom-zero3", "custom", zero_stage=3),
    Case("llama-model-only", "llama", zero_stage=2, without_optimizer=True),
    Case("llama-safetensors", "llama", "safetensors", world_size=1, precision="fp32"),
    Case("llama-safetensors-sharded", "llama", "safetensors", world_size=1, max_shard_size=20_000),
    Case("falcon-bin", "falcon-small", "bin", world_size=1),
    Case("falcon-bin-sharded", "falcon-small", "bin", world_size=1, precision="fp32", max_shard_size=30_000),
    Case("gpt2-safetensors", "gpt2", "safetensors", world_size=1, precision="fp32"),
    Case("mixtral-zero2", "mixtral", zero_stage=2),
    Case("mixtral-zero3", "mixtral", zero_stage=3),
    Case("llama-zero2-fp16", "llama", zero_stage=2, precision="fp16"),
    Case("llama-fp32-zero2", "llama", zero_stage=2, precision="fp32"),
    Case("llama-zero1-bf16-optimizer", "llama", zero_stage=1, deepspeed={"data_types": {"grad_accum_dtype": "fp32"}}),
    Case("llama-zero2-offload", "llama", zero_stage=2, deepspeed=_zero(offload_optimizer={"device": "cpu"})),
    Case("llama-zero2-roundrobin", "llama", zero_stage=2, deepspeed=_zero(round_robin_gradients=True)),
    Case("llama-zero3-subgroups", "llama", zero_stage=3, deepspeed=_zero(sub_group_size=3000)),
    Case("llama-zero3-4ranks", "llama", zero_stage=3, world_size=4),
    Case("tiny-stage0-bf16", "tiny", zero_stage=0),
    Case("tiny-stage0-fp16-tied", "tiny", zero_stage=0, precision="fp16", config={"tie_word_embeddings": True}),
    Case("tiny-stage0-fp16-fused", "tiny", zero_stage=0, precision="fp16", optimizer={}),
    Case("tiny-stage0-fp32", "tiny", zero_stage=0, precision="fp32"),
    Case("tiny-zero1-aligned", "tiny", zero_stage=1, world_size=3, deepspeed=_zero(parameter_alignment=True)),
    Case(
        "tiny-zero2-aligned-roundrobin",
        "tiny",
        zero_stage=2,
        deepspeed=_zero(parameter_alignment=True, round_robin_gradients=True, contiguous_gradients=False),
    ),
    Case("tiny-zero3-hpz", "tiny", zero_stage=3, world_size=4, deepspeed=_zero(zero_hpz_partition_size=2)),
    Case("tiny-zero3-init", "tiny", zero_stage=3, born_partitioned=True),
    Case("tiny-zero2-without-frozen", "tiny", zero_stage=2, frozen=("model.embed_tokens.",), without_frozen=True),
    Case("tiny-zero3-without-frozen", "tiny", zero_stage=3, frozen=("model.embed_tokens.",), without_frozen=True),
    Case("tiny-zero2-deepspeed-0.14", "tiny", zero_stage=2, version="0.14.5"),
    Case("tiny-zero3-deepspeed-0.16", "tiny", zero_stage=3, version="0.16.9"),
    Case("tiny-universal-zero2", "tiny", zero_stage=2, frozen=("lm_head.",), universal=True),
    Case("tiny-universal-zero3", "tiny", zero_stage=3, world_size=3, frozen=("lm_head.",), universal=True),
    Case("llama-tp-zero2", "llama", zero_stage=2, world_size=4, config=_GROUPED_HEADS, deepspeed=_TENSOR_PARALLEL),
    Case("tiny-tp-stage0", "tiny", zero_stage=0, config={"num_key_value_heads": 2}, deepspeed=_TENSOR_PARALLEL),
    Case(
        "neox-tp-zero3", "neox", zero_stage=3, world_size=4, config={"num_hidden_layers": 1}, deepspeed=_TENSOR_PARALLEL
    ),
    Case("llama-pipeline", "llama", "pipeline", zero_stage=1, deepspeed=_SGD),
    Case("llama-pipeline-tied", "llama", "pipeline", 1, 4, config={"tie_word_embeddings": True}, deepspeed=_SGD),
    Case("experts-zero2", "experts", zero_stage=2, world_size=4, deepspeed=_SGD),
]

CASES = {case.name: case for case in _CASES}
