"""Everything that is known before the first byte is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from exporter.adapter import adapter_vocabulary, base_on_hub
from exporter.card import render_card
from exporter.checkpoints import Checkpoint
from exporter.checkpoints.adapter import CONFIG as ADAPTER_CONFIG
from exporter.checkpoints.rl_checkpoint import with_rl_weights
from exporter.code import read_code
from exporter.config import (
    dump_json,
    edit_adapter_config,
    edit_config,
    edit_generation_config,
    read_config,
    read_generation_config,
    with_rope_scaling,
)
from exporter.console import Console
from exporter.credentials import require_no_credentials
from exporter.description import describe_plan, describe_tensors, describe_vocabulary
from exporter.errors import UsageError
from exporter.facts import card_facts, given_texts
from exporter.hub import HubAccess, known_tokens
from exporter.inspection import describe
from exporter.options import Options
from exporter.page_cache import read_ahead
from exporter.plan import INDEX_NAME, ExportPlan
from exporter.processor import read_processor
from exporter.report import Report
from exporter.reward_model import as_reward_model
from exporter.source import CodeElsewhere, open_kept_adapter, open_model
from exporter.tokenizer import Vocabulary, settle_vocabulary
from exporter.weights import PlannedWeights, plan_adapter, plan_weights


@dataclass(frozen=True)
class Prepared:
    """Everything that is known before the first byte is written; ``texts`` are all files but the weights.

    The card is the last of ``texts``, made of the facts of the others.
    ``code_commits`` are the repositories that code was taken from, each with its commit.
    """

    checkpoint: Checkpoint
    vocabulary: Vocabulary
    planned: PlannedWeights
    texts: Mapping[str, bytes]
    code_commits: Mapping[str, str]

    @property
    def plan(self) -> ExportPlan:
        return self.planned.plan


def prepare(options: Options, report: Report, console: Console) -> Prepared:
    """Open the checkpoint, settle the tokenizer, match the weights with the architecture, plan every file."""
    access = replace(options.access, bars=not console.quiet)
    prepared = (prepare_adapter if options.keep_adapter else prepare_model)(options, access, console)
    checkpoint, vocabulary, planned = prepared.checkpoint, prepared.vocabulary, prepared.planned
    for note in planned.notes:
        console.warn(note)
    report.checkpoint = describe(checkpoint, planned.weights)
    report.vocabulary = describe_vocabulary(vocabulary, planned.rows)
    report.tensors = describe_tensors(planned, checkpoint)
    facts = card_facts(options, checkpoint, vocabulary, planned)
    card = render_card(facts, options.card_template).encode()
    prepared = replace(prepared, texts={**prepared.texts, "README.md": card})
    require_no_credentials({**given_texts(options, facts), **prepared.texts}, known_tokens(options.auth_token))
    report.output = describe_plan(planned, prepared.texts)
    return prepared


def prepare_model(options: Options, access: HubAccess, console: Console) -> Prepared:
    """The repository of a model, without its card."""
    checkpoint, config = open_with_config(options, access, console)
    for note in checkpoint.notes:
        console.note(note)
    if not options.dry_run:
        read_ahead((checkpoint.model or checkpoint.master or {}).values())
    generation_config = read_generation_config(checkpoint.config_folder)
    vocabulary = settle_vocabulary(
        checkpoint.tokenizer_folder,
        prompt_format=_prompt_format(options),
        special_tokens=options.special_tokens,
        config=config,
        generation_config=generation_config,
    )
    elsewhere = CodeElsewhere(access, console)
    code = read_code(checkpoint.config_folder, elsewhere if options.trust_remote_code else None)
    planned = plan_weights(options, checkpoint, config, code, vocabulary)
    edited = edit_config(planned.config, vocabulary=vocabulary, rows=planned.rows, dtype=planned.dtype)
    texts: dict[str, bytes] = {"config.json": dump_json(edited), **vocabulary.files, **code}
    texts |= read_processor(checkpoint.config_folder)
    generation = edit_generation_config(generation_config, config, vocabulary)
    if generation is not None:
        texts["generation_config.json"] = dump_json(generation)
    if (index := planned.plan.index) is not None:
        texts[INDEX_NAME] = index
    return Prepared(checkpoint, vocabulary, planned, texts, elsewhere.commits)


def open_with_config(options: Options, access: HubAccess, console: Console) -> tuple[Checkpoint, dict[str, Any]]:
    """The checkpoint with the weights that the options mean, and config.json for them."""
    checkpoint = open_model(options.checkpoint, options.tag, options.base_model, access, console)
    if options.rl_checkpoint is not None:
        checkpoint = with_rl_weights(checkpoint, options.rl_checkpoint)
    config = read_config(checkpoint.config_folder, checkpoint.config_changes)
    if options.reward_model:
        config = as_reward_model(config)
    if options.rope_scaling_factor is not None:
        config = with_rope_scaling(config, options.rope_kind, options.rope_scaling_factor)
    return checkpoint, config


def _prompt_format(options: Options) -> str:
    """A reward model keeps its tokenizer unless told otherwise: it learnt to score what that makes of a dialogue."""
    return "none" if options.reward_model and options.prompt_format == "auto" else options.prompt_format


def prepare_adapter(options: Options, access: HubAccess, console: Console) -> Prepared:
    """The repository of an adapter, without its card.

    Raises:
        UsageError: it would be published in the place of its own base.
        RefusedError: a tokenizer is asked for that the adapter or the base's embedding does not have.
    """
    checkpoint = open_kept_adapter(options.checkpoint, options.tag, options.base_model, access, console)
    for note in checkpoint.notes:
        console.note(note)
    base, commit = base_on_hub(checkpoint)
    if options.repo_name == base:
        raise UsageError(f"{base} is the adapter's base model.", "Name another repository.")
    planned = plan_adapter(options, checkpoint)
    vocabulary = adapter_vocabulary(checkpoint, planned.config, options.prompt_format, options.special_tokens)
    edited = edit_adapter_config(checkpoint.adapter or {}, base, commit)
    texts = {ADAPTER_CONFIG: dump_json(edited), **vocabulary.files}
    return Prepared(checkpoint, vocabulary, planned, texts, {})
