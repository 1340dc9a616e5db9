"""Training a model that lies on several ranks in parts: tensor parallelism, a pipeline, experts."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedModel

Weights = dict[str, torch.Tensor]


def from_all_ranks(weights: Weights) -> list[Weights]:
    """What every rank has, in their order."""
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, weights)
    return found


def join_slices(weights: Weights, shapes: dict[str, torch.Size], degree: int) -> Weights:
    """The whole tensors, of ``shapes``, of which each of ``degree`` tensor-parallel ranks has a slice."""
    ranks = from_all_ranks(weights)[:degree]
    return {name: _join(name, [rank[name] for rank in ranks], shapes[name]) for name in weights}


def _join(name: str, parts: list[torch.Tensor], shape: torch.Size) -> torch.Tensor:
    cut = [axis for axis, size in enumerate(parts[0].shape) if size != shape[axis]]
    joined = torch.cat(parts, dim=cut[0]) if cut else parts[0]
    if joined.shape != shape or not (cut or all(torch.equal(part, parts[0]) for part in parts)):
        raise RuntimeError(f"the slices of {name} do not make up its shape {list(shape)}")
    return joined


def make_pipeline(model: LlamaForCausalLM) -> nn.Module:
    """The model's own modules as layers of a DeepSpeed pipeline of two stages; tied weights as a shared layer."""
    from deepspeed.pipe import PipelineModule, TiedLayerSpec
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    config = model.config
    rotary = LlamaRotaryEmbedding(config)

    class Block(LlamaDecoderLayer):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            positions = torch.arange(hidden.shape[1]).unsqueeze(0)
            return super().forward(
                hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary(hidden, positions)
            )

    class Embedding(nn.Embedding):
        def __init__(self) -> None:
            super().__init__(config.vocab_size, config.hidden_size, _weight=model.model.embed_tokens.weight.data)

    for block in model.model.layers:
        block.__class__ = Block
    ends: list[Any] = [model.model.embed_tokens, model.lm_head]
    if config.tie_word_embeddings:
        ends = [
            TiedLayerSpec("embedding", Embedding),
            TiedLayerSpec("embedding", Embedding, forward_fn=lambda embedding, hidden: hidden @ embedding.weight.T),
        ]
    layers = [ends[0], *model.model.layers, model.model.norm, ends[1]]

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())

    return PipelineModule(layers=layers, num_stages=2, loss_fn=loss, partition_method="uniform")


def name_in_model(name: str, blocks: int) -> str:
    """The name in the Llama model of a parameter of :func:`make_pipeline`'s pipeline."""
    layer, _, within = name.partition(".")
    if layer == "tied_modules":
        return "model.embed_tokens.weight"
    places = {0: "model.embed_tokens", blocks + 1: "model.norm", blocks + 2: "lm_head"}
    return f"{places.get(int(layer), f'model.layers.{int(layer) - 1}')}.{within}"


def spread_experts(model: PreTrainedModel) -> list[dict[str, Any]]:
    """Replace the model's mixtures by DeepSpeed's, half of the experts on each of two ranks; returns the groups."""
    from custom_code.modeling_experts import EXPERTS, make_expert
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    hidden_size = model.config.hidden_size
    for index in range(len(model.layers)):
        model.layers[index] = MoE(hidden_size, make_expert(hidden_size), num_experts=EXPERTS, ep_size=2, k=1)
    groups: list[dict[str, Any]] = split_params_into_different_moe_groups_for_optimizer(
        {"params": list(model.parameters()), "name": "all"}
    )
    return groups


def join_experts(weights: Weights) -> Weights:
    """The weights of the first two ranks, each expert under its own number."""
    joined: Weights = {}
    for rank, own in enumerate(from_all_ranks(weights)[:2]):
        for name, tensor in own.items():
            match = re.fullmatch(r"(.*deepspeed_experts\.)(\d+)(\..*)", name)
            joined[f"{match[1]}{int(match[2]) + 2 * rank}{match[3]}" if match else name] = tensor
    return joined
