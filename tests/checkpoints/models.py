"""The tiny models, their tokenizer and the turns that they are trained on."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

HERE = Path(__file__).parent
END_OF_TEXT = "<|endoftext|>"

NO_LOSS = -100
"""The label that torch's cross entropy leaves out."""

Example = dict[str, list[int]]

_SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_POSITIONS = {"max_position_embeddings": 128}
_LLAMA = {**_SMALL, **_POSITIONS, "num_key_value_heads": 1, "tie_word_embeddings": False}
_TINY = {"hidden_size": 4, "num_hidden_layers": 1, "intermediate_size": 20}

VOCABULARY = {"falcon": 384, "tiny": 67}
"""Rows of the embedding and tokens of the tokenizer, where it is not :data:`SMALL_VOCABULARY`: an odd number, so that
partitions need padding."""
SMALL_VOCABULARY = 281

BASE_MODEL = {"falcon": "tiiuae/falcon-7b", "mixtral": "mistralai/Mixtral-8x7B-v0.1"}
"""What a user would have fine-tuned. transformers 4 writes it to config.json as ``_name_or_path``, 5 does not."""


def turns() -> list[tuple[str, str]]:
    """Questions and answers of the corpus."""
    blocks = (HERE / "corpus.txt").read_text(encoding="utf-8").strip().split("\n\n")
    return [(question, answer) for question, answer in (block.split("\n") for block in blocks)]


def examples(tokenizer: PreTrainedTokenizerFast) -> list[Example]:
    """Each turn as token ids, question and answer each ended by the eos token; the loss is taken on the answer."""
    return [_example(*ids, [], []) for ids in _token_ids(tokenizer)]


def marked_examples(tokenizer: PreTrainedTokenizerFast, copies: int) -> list[Example]:
    """The same, ``copies`` times, with an arbitrary token before question and answer.

    The model learns to answer whatever that token is, so it also answers a prompt format whose markers it never saw.
    """
    chance = random.Random(1)

    def marker() -> list[int]:
        return [chance.randrange(1, len(tokenizer))]

    return [_example(*ids, marker(), marker()) for ids in _token_ids(tokenizer) * copies]


def _token_ids(tokenizer: PreTrainedTokenizerFast) -> list[tuple[list[int], list[int]]]:
    return [
        (tokenizer(question + END_OF_TEXT)["input_ids"], tokenizer(answer + END_OF_TEXT)["input_ids"])
        for question, answer in turns()
    ]


def _example(question: list[int], answer: list[int], before_question: list[int], before_answer: list[int]) -> Example:
    prompt = [*before_question, *question, *before_answer]
    return {"input_ids": [*prompt, *answer], "labels": [NO_LOSS] * len(prompt) + answer}


def make_tokenizer(model: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the corpus, with one special token and no chat template.

    The tiny model's knows the bytes of the corpus alone.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY.get(model, SMALL_VOCABULARY),
        special_tokens=[END_OF_TEXT],
        initial_alphabet=[] if model == "tiny" else pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for turn in turns() for text in turn), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, model_max_length=128)


def make_model(model: str, changes: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A freshly initialized model of the named kind."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    config = _config(model, {"vocab_size": len(tokenizer), **changes}, tokenizer.eos_token_id)
    own = {"custom": _custom_class, "experts": _experts_class}.get(model)
    result: PreTrainedModel = own()(config) if own else AutoModelForCausalLM.from_config(config)
    result.config.architectures = [type(result).__name__]
    result.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, max_length=128)
    return result


def _config(model: str, options: dict[str, Any], eos: int) -> PreTrainedConfig:
    import transformers

    special = {"bos_token_id": eos, "eos_token_id": eos}
    match model:
        case "llama":
            return transformers.LlamaConfig(**{**_LLAMA, "intermediate_size": 36, **special, **options})
        case "tiny":
            return transformers.LlamaConfig(**{**_LLAMA, **_TINY, **special, **options})
        case "mixtral":
            experts = {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2}
            return transformers.MixtralConfig(**{**_LLAMA, **experts, **special, **options})
        case "falcon":
            shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
            return transformers.FalconConfig(**{**shape, **_FALCON, **special, **options})
        case "falcon-small":
            return transformers.FalconConfig(**{**_SMALL, **_FALCON, **special, **options})
        case "neox":
            shape = {**_SMALL, **_POSITIONS, "intermediate_size": 40, "tie_word_embeddings": False}
            return transformers.GPTNeoXConfig(**{**shape, **special, **options})
        case "gpt2":
            shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128}
            return transformers.GPT2Config(**{**shape, **special, **options})
        case "custom":
            config = sys.modules[_custom_class().__module__].TinyConfig(**{**special, **options})
            config.auto_map = {
                "AutoConfig": "configuration_tiny.TinyConfig",
                "AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM",
            }
            return config
        case "experts":
            config = sys.modules[_experts_class().__module__].ExpertsConfig(**{**special, **options})
            config.auto_map = {
                "AutoConfig": "configuration_experts.ExpertsConfig",
                "AutoModelForCausalLM": "modeling_experts.ExpertsForCausalLM",
            }
            return config
    raise ValueError(f"unknown model {model}")


_FALCON = {"multi_query": True, "parallel_attn": True, "bias": False, "new_decoder_architecture": False, "alibi": False}


def _custom_class() -> type[PreTrainedModel]:
    from custom_code.modeling_tiny import TinyForCausalLM

    return TinyForCausalLM


def _experts_class() -> type[PreTrainedModel]:
    from custom_code.modeling_experts import ExpertsForCausalLM

    return ExpertsForCausalLM
