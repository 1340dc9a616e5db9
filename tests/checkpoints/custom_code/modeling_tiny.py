"""A causal model with every kind of tensor that a checkpoint can hold: parameters, kept in fp32 or not, and buffers."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_tiny import TinyConfig


class TinyMixer(nn.Module):
    """Adds to each position a weighted mean of the ``window`` positions that end there."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.window = config.window
        self.norm = nn.LayerNorm(config.hidden_size)
        self.up = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.down = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.register_buffer("scale", torch.linspace(0.9, 1.1, config.hidden_size))
        self.register_buffer("decay", self.initial_decay(), persistent=False)

    def initial_decay(self) -> torch.Tensor:
        return 0.5 ** torch.arange(self.window)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        normed = self.norm(hidden)
        padded = nn.functional.pad(normed, (0, 0, self.window - 1, 0))
        mixed = torch.zeros_like(normed)
        for shift in range(self.window):
            start = self.window - 1 - shift
            mixed = mixed + self.decay[shift].to(normed.dtype) * padded[:, start : start + normed.shape[1]]
        mixed = mixed * self.scale.to(normed.dtype)
        return hidden + self.down(nn.functional.gelu(self.up(mixed)))


class TinyForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = TinyConfig
    base_model_prefix = "layers"
    _keep_in_fp32_modules: ClassVar[list[str]] = ["gate"]
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["gate"]

    def __init__(self, config: TinyConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(TinyMixer(config) for _ in range(config.num_hidden_layers))
        self.gate = nn.Linear(config.hidden_size, config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_buffer("token_count", torch.zeros(config.vocab_size, dtype=torch.int64))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, TinyMixer):
            # transformers 5 builds on the meta device, where a buffer that no file holds has no value yet.
            module.decay.copy_(module.initial_decay())

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: object) -> CausalLMOutput:
        if self.training:
            self.token_count += torch.bincount(input_ids.flatten(), minlength=len(self.token_count))
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        gate = torch.sigmoid(self.gate(hidden.to(self.gate.weight.dtype))).to(hidden.dtype)
        logits = self.lm_head(hidden * gate)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: object) -> dict[str, torch.Tensor]:
        return {"input_ids": input_ids}
