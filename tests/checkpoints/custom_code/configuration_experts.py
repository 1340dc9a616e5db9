"""The configuration of a small model with a mixture of experts."""

from __future__ import annotations

from transformers import PretrainedConfig


class ExpertsConfig(PretrainedConfig):
    model_type = "tiny-experts"

    def __init__(
        self, vocab_size: int = 300, hidden_size: int = 16, num_hidden_layers: int = 2, **kwargs: object
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        super().__init__(**kwargs)
