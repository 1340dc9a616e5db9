"""The configuration of a small model that lives beside its checkpoint and in no library."""

from __future__ import annotations

from transformers import PretrainedConfig


class TinyConfig(PretrainedConfig):
    model_type = "tiny-mixer"

    def __init__(
        self,
        vocab_size: int = 300,
        hidden_size: int = 16,
        num_hidden_layers: int = 2,
        window: int = 4,
        **kwargs: object,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.window = window
        super().__init__(**kwargs)
