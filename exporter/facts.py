"""The card's facts: options first, then what the checkpoint knows."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporter.adapter import adapter_facts, base_on_hub
from exporter.card import CardFacts, CardMetadata, PromptFacts, TrainingConfig, read_card_metadata, read_training_facts
from exporter.checkpoints import Checkpoint
from exporter.errors import UsageError
from exporter.options import Options
from exporter.tokenizer import QUESTION, Vocabulary
from exporter.weights import PlannedWeights


def card_facts(options: Options, checkpoint: Checkpoint, vocabulary: Vocabulary, planned: PlannedWeights) -> CardFacts:
    """What the card can say of this export: options first, then what the checkpoint knows."""
    config = planned.config
    configs = tuple(TrainingConfig(path.name, _read_text(path)) for path in options.training_configs)
    known = read_card_metadata(checkpoint.folder, config, configs)
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    task = "text-classification" if options.reward_model else _pipeline_tag(planned.class_name)
    return CardFacts(
        repo_name=options.repo_name,
        base_model=base_on_hub(checkpoint)[0] if options.keep_adapter else _base_model(options, checkpoint, known),
        license=options.license or known.license,
        languages=options.languages or known.languages,
        datasets=options.datasets or known.datasets,
        tags=("conversational",) if vocabulary.chat_template and not options.reward_model else (),
        pipeline_tag=task,
        architecture=planned.class_name,
        dtype=planned.dtype,
        parameters=sum(tensor.source.numel for tensor in planned.plan.tensors),
        context_length=_context_length(text or {}),
        trust_remote_code=options.trust_remote_code,
        adapter=adapter_facts(checkpoint, vocabulary) if options.keep_adapter else None,
        prompt=None if options.reward_model else _prompt_facts(vocabulary),
        training=read_training_facts(checkpoint.folder, checkpoint.folder.parent, checkpoint.deepspeed_config, configs),
        training_configs=configs,
        train_command=options.train_command,
        export_command=options.command,
    )


def given_texts(options: Options, facts: CardFacts) -> dict[str, bytes]:
    """What the user gave to be published, by the option that gave it: a card template need not show it."""
    given = {"--train_command": options.train_command, "--commit_message": options.commit_message}
    given |= {config.name: config.text for config in facts.training_configs}
    return {name: text.encode() for name, text in given.items() if text}


def _base_model(options: Options, checkpoint: Checkpoint, known: CardMetadata) -> str | None:
    return _hub_id(options.base_model) or _exported_model(options, checkpoint) or known.base_model


def _exported_model(options: Options, checkpoint: Checkpoint) -> str | None:
    """The model on the Hub that is exported; not where it is published to its own place again."""
    return checkpoint.repo_id if checkpoint.repo_id != options.repo_name else None


def _hub_id(base_model: str | None) -> str | None:
    """The Hub's name of a base model that may also be given as a folder or with a revision."""
    return None if base_model is None or os.path.isdir(base_model) else base_model.partition("@")[0]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path.name} cannot be read as UTF-8 text.", "Give a YAML file.") from error


def _context_length(config: Mapping[str, Any]) -> int | None:
    found = (config.get(key) for key in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"))
    return next((value for value in found if isinstance(value, int) and value > 0), None)


def _pipeline_tag(class_name: str) -> str | None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    if class_name.endswith(("ForCausalLM", "LMHeadModel")):
        return "text-generation"
    if class_name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values():
        return "image-text-to-text"
    return "text-classification" if class_name.endswith("ForSequenceClassification") else None


def prompt_of(vocabulary: Vocabulary) -> str:
    if vocabulary.chat_template is None:
        return QUESTION
    return vocabulary.render([{"role": "user", "content": QUESTION}])


def _prompt_facts(vocabulary: Vocabulary) -> PromptFacts:
    tokens = {"oasst": ("<|prompter|>", "<|assistant|>"), "chatml": ("<|im_start|>", "<|im_end|>")}
    return PromptFacts(
        prompt_format=vocabulary.prompt_format,
        example=prompt_of(vocabulary),
        is_chat_template=vocabulary.chat_template is not None,
        special_tokens=tokens.get(vocabulary.prompt_format, ()),
        eos_token=vocabulary.eos_token,
        end_of_turn=vocabulary.end_of_turn,
    )
