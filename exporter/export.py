"""The recipe: from a checkpoint to a published model repository, read top to bottom."""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from exporter.adapter import adapter_facts, adapter_vocabulary, base_on_hub
from exporter.architecture import Account, Architecture, account, ask_architecture, name_layers
from exporter.card import (
    CardFacts,
    CardMetadata,
    PromptFacts,
    TrainingConfig,
    read_card_metadata,
    read_training_facts,
    render_card,
)
from exporter.checkpoints import Checkpoint, WeightsChoice
from exporter.checkpoints.adapter import CONFIG as ADAPTER_CONFIG
from exporter.checkpoints.adapter import WEIGHTS as ADAPTER_WEIGHTS
from exporter.checkpoints.adapter import count_merged
from exporter.checksums import check_members
from exporter.code import read_code
from exporter.config import (
    dump_json,
    edit_adapter_config,
    edit_config,
    edit_generation_config,
    read_config,
    read_generation_config,
    untied,
    vocabulary_rows,
    with_rows,
)
from exporter.console import Console
from exporter.credentials import require_no_credentials
from exporter.errors import CheckpointError, RefusedError, UsageError
from exporter.hub import (
    Connection,
    Destination,
    HubAccess,
    OutgoingFile,
    Publication,
    Push,
    connect,
    download,
    has_token,
    known_tokens,
)
from exporter.inputs import Inputs
from exporter.inspection import describe
from exporter.manifest import MANIFEST_NAME, Manifest
from exporter.plan import INDEX_NAME, ExportPlan, Shard, plan_export, plan_file
from exporter.processor import read_processor
from exporter.report import Report, package_versions
from exporter.shards import Batch, NonFinite, Progress, WrittenFile, WrittenShard, write_file, write_shard
from exporter.source import CodeElsewhere, find_model, open_kept_adapter, open_model
from exporter.staging import Staging, check_output_folder, place_export, private_place, staging_folder
from exporter.tensors import DType, GrownTensor, LazyTensor, Member, Piece
from exporter.tokenizer import QUESTION, Vocabulary, embedding_rows, settle_vocabulary
from exporter.verify import Check, check_batch, check_copy, check_file, check_loads, check_names, require_equal

_TARGETS = {"bf16": DType.BF16, "fp16": DType.F16, "fp32": DType.F32, "keep": None}


@dataclass(frozen=True)
class Options:
    """What the user asked for. ``command`` is how the card shows it; ``max_shard_size`` is in bytes."""

    checkpoint: Path
    tag: str | None = None
    trust_remote_code: bool = False
    dtype: str = "bf16"
    weights: WeightsChoice = "auto"
    max_shard_size: int = 5_000_000_000
    allow_nonfinite: bool = False
    prompt_format: str = "auto"
    special_tokens: tuple[str, ...] = ()
    license: str | None = None
    base_model: str | None = None
    languages: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    card_template: Path | None = None
    training_configs: tuple[Path, ...] = ()
    train_command: str | None = None
    hf_repo_name: str | None = None
    auth_token: str | None = None
    private: bool = True
    revision: str = "main"
    create_pr: bool = False
    release_tag: str | None = None
    commit_message: str | None = None
    rehearse: bool = False
    no_publish: bool = False
    output_folder: Path | None = None
    keep_adapter: bool = False
    overwrite: bool = False
    dry_run: bool = False
    verify: str = "source"
    jobs: int = 1
    cache_dir: Path | None = None
    command: str = ""

    @property
    def repo_name(self) -> str | None:
        """The repository that the card names; a rehearsal without a name gets one."""
        return self.hf_repo_name or ("rehearsal/model" if self.rehearse else None)

    @property
    def access(self) -> HubAccess:
        return HubAccess(token=self.auth_token, cache=self.cache_dir)

    @property
    def publishes(self) -> bool:
        return self.hf_repo_name is not None and not self.no_publish and not self.rehearse

    @property
    def destination(self) -> Destination:
        return Destination(
            repo_id=self.repo_name or "",
            revision=self.revision,
            private=self.private,
            create_pr=self.create_pr,
            release_tag=self.release_tag,
            commit_message=self.commit_message,
        )


@dataclass(frozen=True)
class PlannedWeights:
    """What becomes of the weights: the files that they are written to, and where they come from.

    ``class_name`` is the architecture's. ``weights`` is the set that is read (master or model), ``dtype`` what
    config.json says, ``rows`` those of the embedding (None: there is none). ``config`` is config.json for these
    weights, apart from dtype, rows and tokens; of an adapter that of its base. ``copies`` are the model's own weights
    where the master weights are written. ``notes`` are for the user.
    """

    plan: ExportPlan
    account: Account
    class_name: str
    config: Mapping[str, Any]
    weights: str
    dtype: DType
    rows: int | None
    copies: Mapping[str, LazyTensor]
    notes: tuple[str, ...]


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


def run_export(options: Options, report: Report, console: Console) -> None:
    """Export ``options.checkpoint``; ``report`` is filled as the run goes on.

    Raises:
        ExportError: as the stages raise it; nothing half-made is left behind or published.
    """
    destination = options.destination if options.repo_name else None
    if options.no_publish and options.output_folder is None and not options.dry_run:
        raise UsageError("--no_publish leaves nothing behind without a folder.", "Add --output_folder.")
    is_folder = find_model(options.checkpoint) is None
    if options.output_folder is not None:
        source = options.checkpoint if is_folder else options.access.cache_folder
        check_output_folder(options.output_folder, source, options.overwrite)
    with report.timed("prepare"), _uncollected():
        prepared = prepare(options, report, console)
    if options.output_folder is not None and prepared.checkpoint.base is not None:
        check_output_folder(options.output_folder, prepared.checkpoint.base.folder, options.overwrite)
    card = prepared.texts["README.md"].decode()
    connection = None
    if destination is not None and options.publishes:
        connection = _connect(destination, card, options, report, console)
    if options.dry_run:
        report.status = "planned"
        report.hub = _describe_forecast(connection, prepared) if connection is not None else None
        return
    inputs = Inputs.of((tensor.source for tensor in prepared.plan.tensors), prepared.checkpoint)
    key = _staging_key(prepared, inputs, options)
    with staging_folder(_place(options), key, _needed(prepared, options)) as staging:
        if taken_over := staging.journal.finished_bytes:
            console.note(f"An earlier run was interrupted; the {taken_over:,} bytes that it finished are taken over.")
        push = Push(connection, note=console.note) if connection is not None else None
        files = write(prepared, inputs, staging, push, options, report, console)
        if options.verify == "load":
            with report.timed("load"):
                prompt = prompt_of(prepared.vocabulary)
                trust = options.trust_remote_code
                report.checks.append(check_loads(staging.folder, prompt, trust, options.cache_dir))
        report.status = "exported"
        if options.rehearse and destination is not None:
            rehearse(destination, staging.folder, files, prepared, options, report, console)
        elif push is not None:
            finish_push(push, staging.folder, files, report, console)
        if options.output_folder is not None:
            place_export(staging, options.output_folder, options.overwrite)
            report.output["folder"] = str(options.output_folder)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without Python's collector, which would go again and again over all that torch and transformers make on import,
    and once more at the end of the process: a second of each run."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _place(options: Options) -> Path:
    """Where the export goes; without an output folder a place of its own for the same checkpoint and options."""
    if options.output_folder is not None:
        return options.output_folder
    made_from = (os.path.realpath(options.checkpoint), options.tag, options.repo_name, _content_options(options))
    return private_place(hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:16])


def _staging_key(prepared: Prepared, inputs: Inputs, options: Options) -> str:
    """What a staged export is an export of: the same digest means the same bytes from the same files."""
    digest = hashlib.sha256(json.dumps([package_versions(), options.verify]).encode())
    for shard in prepared.plan.shards:
        digest.update(shard.name.encode() + shard.header)
    for name, text in sorted(prepared.texts.items()):
        digest.update(name.encode() + hashlib.sha256(text).digest())
    for file in inputs.files.values():
        digest.update(json.dumps(asdict(file)).encode())
    return digest.hexdigest()


def _keeps_shards(options: Options) -> bool:
    """Whether a shard is needed after it was sent."""
    return options.output_folder is not None or options.verify == "load" or not options.publishes


def _needed(prepared: Prepared, options: Options) -> int:
    """The most bytes of the export that are in the staging at the same time."""
    sizes = sorted((shard.size for shard in prepared.plan.shards), reverse=True)
    texts = sum(map(len, prepared.texts.values()))
    return texts + sum(sizes if _keeps_shards(options) else sizes[: _staged_shards(options)])


def _staged_shards(options: Options) -> int:
    """Shards at a time: those that are written, and one that is sent meanwhile."""
    return options.jobs + 1


def _connect(
    destination: Destination, card: str, options: Options, report: Report, console: Console
) -> Connection | None:
    """Ask the Hub all that can be known before a weight is read; a dry run does without where there is no token."""
    if options.dry_run and not has_token(options.auth_token):
        console.note("There is no token: the plan is made without asking the Hub.")
        return None
    with report.timed("connect"):
        return connect(destination, token=options.auth_token, card=card, note=console.note)


# Before the first byte


def prepare(options: Options, report: Report, console: Console) -> Prepared:
    """Open the checkpoint, settle the tokenizer, match the weights with the architecture, plan every file."""
    access = replace(options.access, bars=not console.quiet)
    prepared = (prepare_adapter if options.keep_adapter else prepare_model)(options, access, console)
    checkpoint, vocabulary, planned = prepared.checkpoint, prepared.vocabulary, prepared.planned
    for note in planned.notes:
        console.warn(note)
    report.checkpoint = describe(checkpoint, planned.weights)
    report.vocabulary = _describe_vocabulary(vocabulary, planned.rows)
    report.tensors = _describe_tensors(planned)
    facts = card_facts(options, checkpoint, vocabulary, planned)
    card = render_card(facts, options.card_template).encode()
    prepared = replace(prepared, texts={**prepared.texts, "README.md": card})
    require_no_credentials({**_given_texts(options, facts), **prepared.texts}, known_tokens(options.auth_token))
    report.output = _describe_plan(planned, prepared.texts)
    return prepared


def prepare_model(options: Options, access: HubAccess, console: Console) -> Prepared:
    """The repository of a model, without its card."""
    checkpoint = open_model(options.checkpoint, options.tag, options.base_model, access, console)
    for note in checkpoint.notes:
        console.note(note)
    config = read_config(checkpoint.config_folder, checkpoint.config_changes)
    generation_config = read_generation_config(checkpoint.config_folder)
    vocabulary = settle_vocabulary(
        checkpoint.tokenizer_folder,
        prompt_format=options.prompt_format,
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
    if planned.plan.index is not None:
        texts[INDEX_NAME] = planned.plan.index
    return Prepared(checkpoint, vocabulary, planned, texts, elsewhere.commits)


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


def plan_adapter(options: Options, checkpoint: Checkpoint) -> PlannedWeights:
    """All tensors of an adapter in one file, under the names that they have."""
    config = read_config(checkpoint.config_folder, checkpoint.config_changes)
    target = _TARGETS[options.dtype]
    chosen = checkpoint.choose(options.weights, lambda name, dtype: True)
    weights = checkpoint.weights(chosen)
    dtypes = {name: target if target and tensor.dtype.is_floating else tensor.dtype for name, tensor in weights.items()}
    plan = plan_file(ADAPTER_WEIGHTS, weights, dtypes, options.max_shard_size)
    return PlannedWeights(
        plan=plan,
        account=Account(weights=weights, tied={}, dropped={}, tied_values={}),
        class_name=str((config.get("architectures") or [""])[0]),
        config=config,
        weights=chosen,
        dtype=target or _most_common(plan),
        rows=vocabulary_rows(config),
        copies={},
        notes=plan.notes,
    )


def plan_weights(
    options: Options,
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    code: Mapping[str, bytes],
    vocabulary: Vocabulary,
) -> PlannedWeights:
    """Match the checkpoint's weights with the architecture, let the embedding grow, choose dtypes and files."""
    _require_plausible_size(checkpoint, config)
    architecture = ask_architecture(config, code, trust_remote_code=options.trust_remote_code)
    if checkpoint.format == "pipeline":
        checkpoint = checkpoint.renamed(name_layers(architecture, checkpoint.model or {}))
    target = _TARGETS[options.dtype]
    chosen = checkpoint.choose(options.weights, _exactness(architecture, target))
    match = partial(
        account,
        tensors=checkpoint.weights(chosen),
        aliases=checkpoint.aliases,
        is_trained_alone=checkpoint.is_trained_alone,
    )
    matched, notes = match(architecture), list(architecture.notes)
    try:
        require_equal(matched.tied_values, matched.weights)
    except RefusedError as refusal:
        config = untied(config)
        architecture = ask_architecture(config, code, trust_remote_code=options.trust_remote_code)
        matched = match(architecture)
        require_equal(matched.tied_values, matched.weights)
        notes.append(f"{refusal.message} Both are exported, with tie_word_embeddings false.")
    weights, rows = grow(architecture, matched.weights, vocabulary, config, code, options.trust_remote_code)
    dtypes = {name: _written_dtype(architecture, name, tensor.kept_dtype, target) for name, tensor in weights.items()}
    plan = plan_export(weights, dtypes, options.max_shard_size)
    copies: Mapping[str, LazyTensor] = {}
    if chosen == "master" and checkpoint.model is not None:
        copies = account(architecture, checkpoint.model, checkpoint.aliases).weights
    return PlannedWeights(
        plan=plan,
        account=matched,
        class_name=architecture.class_name,
        config=config,
        weights=chosen,
        dtype=target or _most_common(plan),
        rows=rows,
        copies=copies,
        notes=(*notes, *plan.notes),
    )


def _require_plausible_size(checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
    """Every layer has a tensor of its own; a config that names more layers would build them without end."""
    tensors = max(len(checkpoint.model or ()), len(checkpoint.master or ()))
    for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        layers = config.get(key)
        if isinstance(layers, int) and layers > tensors:
            raise CheckpointError(
                f"config.json has {key} {layers:.3g}, but the checkpoint has {tensors} tensors.",
                "Use the config.json that the model was trained with.",
            )


def _exactness(architecture: Architecture, target: DType | None) -> Any:
    def is_exact(name: str, dtype: DType) -> bool:
        place = (
            name
            if name in architecture.disk
            else next((disk for disk, origin in architecture.disk.items() if origin.name == name), None)
        )
        return place is None or dtype is _written_dtype(architecture, place, dtype, target)

    return is_exact


def _written_dtype(architecture: Architecture, name: str, dtype: DType, target: DType | None) -> DType:
    """The dtype in which the tensor ``name`` of ``dtype`` is written."""
    if target is None or not dtype.is_floating:
        return dtype
    return DType.F32 if architecture.keeps_fp32(name, target) else target


def grow(
    architecture: Architecture,
    weights: Mapping[str, LazyTensor],
    vocabulary: Vocabulary,
    config: Mapping[str, Any],
    code: Mapping[str, bytes],
    trust_remote_code: bool,
) -> tuple[dict[str, LazyTensor], int | None]:
    """The weights with enough rows for every id, and the number of rows (None: there is no embedding).

    Which tensors grow is the architecture's to say: it is asked again with the larger vocabulary.

    Raises:
        CheckpointError: there is no row for the eos token, which nobody added.
        RefusedError: a tensor depends on the vocabulary in another way than with a row for each id, or the embedding
            has too few rows for tokens that nobody added.
    """
    embedding = weights.get(architecture.input_embedding or "")
    if embedding is None:
        return dict(weights), None
    old = embedding.shape[0]
    if vocabulary.ordinary_size > old:
        raise RefusedError(
            f"The tokenizer has {vocabulary.ordinary_size} tokens without those added to it, but "
            f"{architecture.input_embedding} has {old} rows: it is not the tokenizer of this model.",
            "Copy the tokenizer that the model was trained with into the checkpoint folder.",
        )
    if vocabulary.eos_id is not None and vocabulary.eos_id >= old and vocabulary.eos_token not in vocabulary.added:
        raise CheckpointError(
            f"The tokenizer's eos token {vocabulary.eos_token!r} has the id {vocabulary.eos_id}, but "
            f"{architecture.input_embedding} has {old} rows: the model was not trained with it.",
            "Correct eos_token in tokenizer_config.json and special_tokens_map.json.",
        )
    rows = embedding_rows(old, vocabulary.size)
    if rows == old:
        return dict(weights), rows
    wider = ask_architecture(with_rows(config, rows), code, trust_remote_code=trust_remote_code).disk
    return {name: _grown(name, tensor, wider[name].shape, old) for name, tensor in weights.items()}, rows


def _grown(name: str, tensor: LazyTensor, shape: tuple[int, ...], old: int) -> LazyTensor:
    if tensor.shape == shape:
        return tensor
    if tensor.shape != (old, *shape[1:]) or not tensor.dtype.is_floating:
        raise RefusedError(
            f"The new tokens make the vocabulary larger, and {name} ({tensor.dtype.value} {list(tensor.shape)}) cannot "
            f"grow to {list(shape)}: new entries of it have no defined value.",
            "Add the tokens before training, or keep the tokenizer with --prompt_format none.",
        )
    return GrownTensor(shape, tensor.dtype, tensor)


def _most_common(plan: ExportPlan) -> DType:
    """The dtype of most floating-point elements."""
    sizes: dict[DType, int] = {}
    for tensor in plan.tensors:
        if tensor.dtype.is_floating:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.source.numel
    return max(sizes, key=lambda dtype: sizes[dtype], default=DType.F32)


# The card's facts


def card_facts(
    options: Options,
    checkpoint: Checkpoint,
    vocabulary: Vocabulary,
    planned: PlannedWeights,
) -> CardFacts:
    """What the card can say of this export: options first, then what the checkpoint knows."""
    config = planned.config
    configs = tuple(TrainingConfig(path.name, _read_text(path)) for path in options.training_configs)
    known = read_card_metadata(checkpoint.folder, config, configs)
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    return CardFacts(
        repo_name=options.repo_name,
        base_model=base_on_hub(checkpoint)[0] if options.keep_adapter else _base_model(options, checkpoint, known),
        license=options.license or known.license,
        languages=options.languages or known.languages,
        datasets=options.datasets or known.datasets,
        tags=tuple(["conversational"] if vocabulary.chat_template else []),
        pipeline_tag=_pipeline_tag(planned.class_name),
        architecture=planned.class_name,
        dtype=planned.dtype,
        parameters=sum(tensor.source.numel for tensor in planned.plan.tensors),
        context_length=_context_length(text or {}),
        trust_remote_code=options.trust_remote_code,
        adapter=adapter_facts(checkpoint, vocabulary) if options.keep_adapter else None,
        prompt=_prompt_facts(vocabulary),
        training=read_training_facts(checkpoint.folder, checkpoint.folder.parent, checkpoint.deepspeed_config, configs),
        training_configs=configs,
        train_command=options.train_command,
        export_command=options.command,
    )


def _given_texts(options: Options, facts: CardFacts) -> dict[str, bytes]:
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


# Bytes on the disk


def write(
    prepared: Prepared,
    inputs: Inputs,
    staging: Staging,
    push: Push | None,
    options: Options,
    report: Report,
    console: Console,
) -> tuple[WrittenFile, ...]:
    """Write every file of the export into the staging and check it; the manifest comes last."""
    with report.timed("write"):
        shards = write_shards(prepared.planned, staging, push, options, console)
        _require_finite(shards, options.allow_nonfinite)
        report.checks += _check_checksums(shards)
        inputs.require_unchanged()
        files = [shard.file for shard in shards]
        files += [write_file(name, content, staging.folder) for name, content in sorted(prepared.texts.items())]
    report.checks += [
        Check("files", "passed", f"{len(files)} files have the size and sha256 that were written"),
        *_merge_checks(prepared.plan),
        *_source_checks(prepared.planned, options),
    ]
    manifest = Manifest(
        files=tuple(files),
        source=_describe_source(prepared, inputs, report),
        options=_content_options(options),
        versions=package_versions(),
        checks=tuple(asdict(check) for check in report.checks),
    )
    files.append(write_file(MANIFEST_NAME, manifest.dump(), staging.folder))
    report.output["files"] = [asdict(file) for file in sorted(files, key=lambda file: file.path)]
    for file in files[len(shards) :]:
        check_file(file, staging.folder)
    return tuple(files)


def write_shards(
    planned: PlannedWeights, staging: Staging, push: Push | None, options: Options, console: Console
) -> list[WrittenShard]:
    """Write, check and send several shards at a time: the threads of ``pool`` hash them, ``workers`` do all else."""
    shards = planned.plan.shards
    passes = 1 + (options.verify != "files") + (push is not None)
    stopped = threading.Event()
    with (
        console.progress("Exporting weights", planned.plan.total_size * passes) as progress,
        ThreadPoolExecutor(max_workers=options.jobs, initializer=_one_thread) as workers,
        ThreadPoolExecutor(max_workers=options.jobs) as pool,
    ):

        def advance(count: int) -> None:
            if stopped.is_set():
                raise InterruptedError("another shard failed, or the run was interrupted")
            progress(count)

        def start(number: int) -> list[Future[WrittenShard]]:
            return [
                pool.submit(_written_and_checked, shard, planned, staging, options, workers, advance)
                for shard in itertools.islice(waiting, number)
            ]

        waiting, finished = iter(shards), []
        running = set(start(_staged_shards(options)))
        try:
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    finished.append(future.result())
                    if push is not None:
                        _send_ahead(push, finished[-1], staging, options)
                        advance(finished[-1].file.size)
                    running.update(start(1))
        except BaseException:
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise
    return sorted(finished, key=lambda written: written.file.path)


def _send_ahead(push: Push, written: WrittenShard, staging: Staging, options: Options) -> None:
    """Upload a finished shard while others are written, and make room for them where nobody keeps it."""
    if written.nonfinite and not options.allow_nonfinite:
        return
    if push.send_ahead(_outgoing(written.file, staging.folder)) and not _keeps_shards(options):
        staging.journal.remove(written)


def _one_thread() -> None:
    """Blocks are small and jobs run side by side: torch's own threads would only wait for one another."""
    import torch

    torch.set_num_threads(1)


def _written_and_checked(
    shard: Shard,
    planned: PlannedWeights,
    staging: Staging,
    options: Options,
    workers: Executor,
    progress: Progress,
) -> WrittenShard:
    """The shard on the disk and proven, now or by an earlier run."""
    written = staging.journal.finished(shard)
    if written is not None:
        progress(shard.size)
        return written

    def check(batch: Batch) -> None:
        check_batch(shard, batch, staging.folder, progress)

    if options.verify == "files":
        written = write_shard(shard, staging.folder, workers, progress)
    else:
        written = write_shard(shard, staging.folder, workers, progress, check)
        check_names(shard, staging.folder)
        copied = [tensor for tensor in shard.tensors if tensor.name in planned.copies]
        masters = [replace(tensor, source=_base(tensor.source)) for tensor in copied]
        list(workers.map(check_copy, masters, [planned.copies[tensor.name] for tensor in copied]))
    staging.journal.add(written)
    return written


def _check_checksums(shards: Sequence[WrittenShard]) -> list[Check]:
    """The archives' own checksums, of every member that was read."""
    pieces: dict[Member, set[Piece]] = {}
    for shard in shards:
        for member, read in shard.pieces.items():
            pieces.setdefault(member, set()).update(read)
    count = check_members(pieces)
    return [Check("checksums", "passed", f"{count} archive members have their CRC-32")] if count else []


def _source_checks(planned: PlannedWeights, options: Options) -> list[Check]:
    if options.verify == "files":
        return []
    count = len(planned.plan.tensors)
    checks = [Check("source", "passed", f"{count} tensors equal the checkpoint bit for bit after the cast")]
    if planned.copies:
        detail = f"{len(planned.copies)} master weights, cast, are the model's own copy bit for bit"
        checks.append(Check("copy", "passed", detail))
    return checks


def _merge_checks(plan: ExportPlan) -> list[Check]:
    count = count_merged(tensor.source for tensor in plan.tensors)
    return [Check("merge", "passed", f"the adapter is merged into {count} tensors, in fp32, each cast once")] * bool(
        count
    )


def _require_finite(shards: Sequence[WrittenShard], allowed: bool) -> None:
    """Refuse NaN, infinities and overflow, which load without a word and are wrong."""
    found = {name: count for shard in shards for name, count in shard.nonfinite.items()}
    if not found or allowed:
        return
    names = ", ".join(f"{name} ({_count(count)})" for name, count in list(found.items())[:3])
    raise RefusedError(
        f"{len(found)} tensor(s) hold values that are not finite: {names}{', …' if len(found) > 3 else ''}.",
        "Export an earlier checkpoint or another --dtype, or pass them on with --allow_nonfinite.",
    )


def _count(count: NonFinite) -> str:
    parts = [f"{count.source} in the checkpoint"] if count.source else []
    return ", ".join(parts + ([f"{count.cast} overflow in the cast"] if count.cast else []))


# Publishing


def finish_push(
    push: Push, folder: Path, files: Sequence[WrittenFile], report: Report, console: Console
) -> Publication:
    """Make exactly ``files`` visible in one commit; those that did not go ahead are sent first."""
    total = sum(file.size for file in files)
    with report.timed("publish"), console.progress("Publishing", total) as progress:
        publication = push.commit([_outgoing(file, folder) for file in files], progress)
    report.status = publication.status
    report.hub = asdict(publication)
    del report.hub["status"]
    return publication


def _outgoing(file: WrittenFile, folder: Path) -> OutgoingFile:
    return OutgoingFile(file.path, folder / file.path, file.size, file.sha256)


def rehearse(
    destination: Destination,
    folder: Path,
    files: Sequence[WrittenFile],
    prepared: Prepared,
    options: Options,
    report: Report,
    console: Console,
) -> None:
    """The whole publish against a throw-away Hub on this machine, downloaded again into a clean folder and loaded."""
    import tempfile

    from exporter.rehearsal import RehearsalHub

    _without_proxy()
    with (
        RehearsalHub(organizations=[destination.namespace]) as hub,
        tempfile.TemporaryDirectory(prefix="rehearsal-") as cache,
    ):
        card = prepared.texts["README.md"].decode()
        connection = connect(destination, token=hub.token, endpoint=hub.endpoint, card=card, note=console.note)
        publication = finish_push(Push(connection, note=console.note), folder, files, report, console)
        with report.timed("read_back"):
            copy = download(
                destination.repo_id,
                publication.commit,
                endpoint=hub.endpoint,
                token=hub.token,
                cache=Path(cache),
            )
            for file in files:
                check_file(file, copy)
            prompt = prompt_of(prepared.vocabulary)
            loaded = check_loads(copy, prompt, options.trust_remote_code, options.cache_dir)
        report.checks.append(Check("rehearsal", "passed", f"{len(files)} files read back; {loaded.detail}"))
    report.status = "rehearsed"


def _without_proxy() -> None:
    """The rehearsal Hub is on this machine: a proxy could not reach it."""
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1", "localhost"]))


# What the report and the manifest say


def _describe_source(prepared: Prepared, inputs: Inputs, report: Report) -> dict[str, Any]:
    facts = {key: report.checkpoint[key] for key in ("format", "zero_stage", "world_size", "tag", "step", "weights")}
    facts |= {key: report.checkpoint[key] for key in ("repo_id", "revision") if report.checkpoint[key] is not None}
    if prepared.checkpoint.base is not None:
        facts["base_model"] = prepared.checkpoint.base.hub_name
    if prepared.code_commits:
        facts["code"] = dict(prepared.code_commits)
    return facts | {"files": [file.describe() for file in inputs.files.values()]}


def _describe_forecast(connection: Connection, prepared: Prepared) -> dict[str, Any]:
    """The report's ``hub`` of a run that publishes nothing; the manifest's size is not known yet."""
    sizes = {shard.name: shard.size for shard in prepared.plan.shards} | {MANIFEST_NAME: 0}
    forecast = connection.forecast(prepared.texts, sizes)
    return {
        "endpoint": connection.endpoint,
        "repo_id": connection.repository.repo_id,
        "url": connection.repository.url,
        "commit": connection.head,
        "revision": connection.revision,
        "pr_url": None,
        "tag": connection.destination.release_tag,
        "transport": None,
        **asdict(forecast),
        "added": sorted(forecast.added + forecast.replaced),
        "uploaded_bytes": 0,
    }


def _base(tensor: LazyTensor) -> LazyTensor:
    return tensor.base if isinstance(tensor, GrownTensor) else tensor


def _content_options(options: Options) -> dict[str, Any]:
    """The options that decide the bytes of the export."""
    return {
        "dtype": options.dtype,
        "weights": options.weights,
        "max_shard_size": options.max_shard_size,
        "prompt_format": Path(options.prompt_format).name,
        "special_tokens": list(options.special_tokens),
        "hf_repo_name": options.repo_name,
        "trust_remote_code": options.trust_remote_code,
        "allow_nonfinite": options.allow_nonfinite,
        "keep_adapter": options.keep_adapter,
    }


def _describe_vocabulary(vocabulary: Vocabulary, rows: int | None) -> dict[str, Any]:
    return {
        "tokenizer_size": vocabulary.size,
        "rows": rows,
        "added": list(vocabulary.added),
        "prompt_format": vocabulary.prompt_format,
        "eos_token": vocabulary.eos_token,
        "pad_token": vocabulary.pad_token,
    }


def _describe_tensors(planned: PlannedWeights) -> dict[str, Any]:
    plan, matched = planned.plan, planned.account
    return {
        "written": len(plan.tensors),
        "cast": sum(tensor.dtype is not tensor.source.dtype for tensor in plan.tensors),
        "kept": {tensor.name: tensor.dtype.name for tensor in plan.tensors if tensor.dtype is not planned.dtype},
        "dropped": dict(matched.dropped),
        "tied": dict(matched.tied),
    }


def _describe_plan(planned: PlannedWeights, texts: Mapping[str, bytes]) -> dict[str, Any]:
    plan = planned.plan
    spelled = {target: name for name, target in _TARGETS.items() if target is not None}
    files = [(shard.name, shard.size) for shard in plan.shards] + [(name, len(text)) for name, text in texts.items()]
    return {
        "folder": None,
        "dtype": spelled.get(planned.dtype, planned.dtype.value),
        "shards": len(plan.shards),
        "total_size": plan.total_size,
        "files": [{"path": name, "size": size, "sha256": None} for name, size in sorted(files)],
    }
