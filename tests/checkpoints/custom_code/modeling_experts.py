"""A causal model with a mixture of experts, whose modules have the names that deepspeed.moe gives them."""

from __future__ import annotations

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_experts import ExpertsConfig

EXPERTS = 4


def make_expert(hidden_size: int) -> nn.Module:
    return nn.Sequential(nn.Linear(hidden_size, 12), nn.GELU(), nn.Linear(12, hidden_size))


class Mixture(nn.Module):
    """Each position goes through the expert that its gate likes most, as in ``deepspeed.moe.layer.MoE`` with k = 1."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        experts = nn.ModuleList(make_expert(hidden_size) for _ in range(EXPERTS))
        gate = nn.ModuleDict({"wg": nn.Linear(hidden_size, EXPERTS, bias=False)})
        parts = {"gate": gate, "experts": nn.ModuleDict({"deepspeed_experts": experts})}
        self.deepspeed_moe = nn.ModuleDict(parts)

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor]:
        scores = self.deepspeed_moe["gate"]["wg"](hidden).softmax(-1)
        weight, chosen = scores.max(-1, keepdim=True)
        experts = self.deepspeed_moe["experts"]["deepspeed_experts"]
        outputs = torch.stack([expert(hidden) for expert in experts], dim=-2)
        index = chosen[..., None].expand(*chosen.shape, hidden.shape[-1])
        return (weight * outputs.gather(-2, index).squeeze(-2),)


class ExpertsForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = ExpertsConfig

    def __init__(self, config: ExpertsConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Mixture(config.hidden_size) for _ in range(config.num_hidden_layers))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **_: object) -> CausalLMOutput:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = hidden + layer(hidden)[0]
        logits = self.lm_head(hidden)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutput(loss=loss, logits=logits)
