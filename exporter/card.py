"""The model card: README.md of the published repository, made of facts; what is not known is left out.

The words stand in a Jinja2 template that the user can replace. What needs care stands here: quoting, so that no text of
a checkpoint or a user breaks out of its place, and the sample code, which runs as printed in transformers 4.57 and 5.
"""

from __future__ import annotations

import json
import os
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from exporter.checkpoints.folder import read_json, regular_size
from exporter.errors import CheckpointError, UsageError
from exporter.local_paths import without_local_paths
from exporter.tensors import DType
from exporter.tokenizer import QUESTION

if TYPE_CHECKING:
    import jinja2

DEFAULT_TEMPLATE = Path(__file__).parent / "templates" / "model_card.md.jinja"
MAX_FRONT_MATTER_BYTES = 256 * 1024
MAX_NEW_TOKENS = 500
"""How much the sample code generates, in tokens, where the model's context allows it."""

_HUB_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", re.ASCII)
_RUN_FOLDER = re.compile(r"(?:checkpoint|global_step)-?\d+")
_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)
_FENCE = re.compile(r"^(`{3,})([^`\n]*)\n(.*?)^\1`*[ \t]*$", re.DOTALL | re.MULTILINE)
_LIMIT = 2**63
_REPAIR = "Repair or remove it: what it says is not needed, and can be given by options."


class TrainingConfig(NamedTuple):
    """A YAML file that the run was configured with: its name without a folder, and its text."""

    name: str
    text: str


@dataclass(frozen=True)
class PromptFacts:
    """How a prompt is written.

    ``prompt_format`` is as in :class:`exporter.tokenizer.Vocabulary`. ``example`` is the whole prompt that
    :data:`QUESTION` becomes, ``is_chat_template`` whether a chat template rendered it. ``special_tokens`` are the
    format's own; those of oasst are the user's and the assistant's, in this order. ``end_of_turn`` is the token that
    ends a reply, ``eos_token`` where it is None.
    """

    prompt_format: str
    example: str
    is_chat_template: bool = True
    special_tokens: tuple[str, ...] = ()
    eos_token: str | None = None
    end_of_turn: str | None = None


@dataclass(frozen=True)
class AdapterFacts:
    """What one must know to load an adapter onto its base model.

    ``base_revision`` is the commit of the base. ``rows`` are those that the training gave to the base's embedding
    (None: as many as it had). ``has_tokenizer`` says that a tokenizer lies beside the adapter.
    """

    base_revision: str
    rows: int | None = None
    has_tokenizer: bool = True


@dataclass(frozen=True)
class TrainingFacts:
    """What is known of a training: sizes of batches in samples, ``context_length`` in tokens, losses of the last log.

    ``batch_size`` is that of one optimizer step over all processes, ``micro_batch_size`` that of one process at once.
    ``best_metric`` is a metric's name, its value and the step at which it was reached (None where that is not known).
    """

    epochs: float | None = None
    steps: int | None = None
    batch_size: int | None = None
    micro_batch_size: int | None = None
    gradient_accumulation: int | None = None
    learning_rate: float | None = None
    context_length: int | None = None
    optimizer: str | None = None
    zero_stage: int | None = None
    precision: str | None = None
    train_loss: float | None = None
    eval_loss: float | None = None
    best_metric: tuple[str, float, int | None] | None = None


@dataclass(frozen=True)
class CardMetadata:
    """What a checkpoint says of itself that a card's front matter repeats."""

    license: str | None = None
    languages: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    base_model: str | None = None


@dataclass(frozen=True)
class CardFacts:
    """All that a card can say. What is None or empty is not known, and the card is silent about it.

    ``repo_name`` is NAMESPACE/NAME. ``dtype`` is the weights' (None: several), ``parameters`` their number of elements,
    ``context_length`` the longest sequence that the architecture takes, in tokens. ``trust_remote_code`` says that the
    model cannot be loaded without its own code. ``adapter`` is None where the weights are a whole model.
    ``export_command`` holds no token and no local path.
    """

    repo_name: str | None = None
    base_model: str | None = None
    license: str | None = None
    languages: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    pipeline_tag: str | None = None
    architecture: str | None = None
    dtype: DType | None = None
    parameters: int | None = None
    context_length: int | None = None
    trust_remote_code: bool = False
    adapter: AdapterFacts | None = None
    prompt: PromptFacts | None = None
    training: TrainingFacts = TrainingFacts()
    training_configs: tuple[TrainingConfig, ...] = ()
    train_command: str | None = None
    export_command: str | None = None


# What the checkpoint and the training say


def read_training_facts(
    folder: Path,
    run_folder: Path | None,
    deepspeed_config: Mapping[str, Any] | None,
    training_configs: Sequence[TrainingConfig] = (),
) -> TrainingFacts:
    """What is known of the training that wrote the checkpoint in ``folder``.

    The Trainer's state and the DeepSpeed config say what was done, and are believed before ``training_configs``, which
    say what was wanted.

    Raises:
        CheckpointError: trainer_state.json is not a JSON object, or cannot be read safely.
        UsageError: a training config is not YAML.
    """
    state = _trainer_state(folder, run_folder)
    deepspeed = deepspeed_config or {}
    settings = _settings(training_configs)
    optimizer = _mapping(deepspeed.get("optimizer"))
    return TrainingFacts(
        epochs=_first(_positive(state.get("epoch")), _number_of(settings, "num_train_epochs")),
        steps=_count(state.get("global_step")),
        batch_size=_count(deepspeed.get("train_batch_size")),
        micro_batch_size=_first(
            _count(deepspeed.get("train_micro_batch_size_per_gpu")), _count(state.get("train_batch_size"))
        ),
        gradient_accumulation=_count(deepspeed.get("gradient_accumulation_steps")),
        learning_rate=_first(
            _positive(_mapping(optimizer.get("params")).get("lr")), _number_of(settings, "learning_rate")
        ),
        context_length=_count(_number_of(settings, "max_length", "max_seq_length")),
        optimizer=_text(optimizer.get("type")),
        zero_stage=_count(_mapping(deepspeed.get("zero_optimization")).get("stage")),
        precision=_precision(deepspeed),
        train_loss=_last(state, "loss"),
        eval_loss=_last(state, "eval_loss"),
        best_metric=_best_metric(state),
    )


def _trainer_state(folder: Path, run_folder: Path | None) -> Mapping[str, Any]:
    """trainer_state.json of the checkpoint; the run's own only where it is of the same step."""
    if (folder / "trainer_state.json").exists():
        return read_json(folder / "trainer_state.json")
    if run_folder is None or not (run_folder / "trainer_state.json").exists():
        return {}
    state = read_json(run_folder / "trainer_state.json")
    return state if folder.name == f"checkpoint-{state.get('global_step')}" else {}


def _logs(state: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    history = state.get("log_history")
    return [_mapping(entry) for entry in history] if isinstance(history, list) else []


def _last(state: Mapping[str, Any], name: str) -> float | None:
    values = [_number(entry[name]) for entry in _logs(state) if name in entry]
    return values[-1] if values else None


def _best_metric(state: Mapping[str, Any]) -> tuple[str, float, int | None] | None:
    """The best metric; its name is not in the state, but that of an equal value in the logs is."""
    best = _number(state.get("best_metric"))
    if best is None:
        return None
    for entry in _logs(state):
        for name, value in entry.items():
            if name.startswith("eval_") and _number(value) == best:
                return name, best, _count(entry.get("step"))
    return None


def _precision(deepspeed: Mapping[str, Any]) -> str | None:
    enabled = (name for name in ("bf16", "fp16") if _mapping(deepspeed.get(name)).get("enabled") is True)
    return next(enabled, None)


def read_card_metadata(
    folder: Path, config: Mapping[str, Any], training_configs: Sequence[TrainingConfig] = ()
) -> CardMetadata:
    """What the checkpoint in ``folder`` says of its license, languages, datasets and base model.

    The front matter of a README.md is asked first, then adapter_config.json, the model's ``config`` and
    ``training_configs``. A base model or dataset counts only as NAMESPACE/NAME: anything else may be a local path, or
    the name of a data loader. A base model that is a folder here does not count either.

    Raises:
        CheckpointError: README.md or adapter_config.json is broken, or cannot be read safely.
        UsageError: a training config is not YAML.
    """
    front_matter = _read_front_matter(folder / "README.md")
    adapter = folder / "adapter_config.json"
    names = [
        *_texts(front_matter.get("base_model"))[:1],
        read_json(adapter).get("base_model_name_or_path") if adapter.exists() else None,
        config.get("_name_or_path"),
        _only(_settings(training_configs), "model_name", "model_name_or_path"),
    ]
    published = (name for name in map(str, filter(_is_published, names)) if not _is_folder(name, folder))
    return CardMetadata(
        license=_text(front_matter.get("license")),
        languages=_texts(front_matter.get("language")),
        datasets=tuple(filter(_is_published, _texts(front_matter.get("datasets")))),
        base_model=next(published, None),
    )


def _read_front_matter(path: Path) -> Mapping[str, Any]:
    if not path.exists():
        return {}
    regular_size(path)
    with path.open("rb") as file:
        text = file.read(MAX_FRONT_MATTER_BYTES).decode("utf-8-sig", errors="replace")
    found = _FRONT_MATTER.match(_lf(text))
    try:
        return _mapping(_read_yaml(found[1])) if found else {}
    except ValueError as error:
        raise CheckpointError(f"The front matter of {path.name} is not valid YAML: {error}.", _REPAIR) from error


def _read_yaml(text: str) -> Any:
    """``text`` as mappings, lists and strings.

    No scalar is interpreted, so that the language ``no`` is not false and ``1e-5`` is what it says. Neither tags nor
    merge keys are followed: in older versions of PyYAML a small text with merge keys grows without bound.

    Raises:
        ValueError: it is not one YAML document; the message is one line.
    """
    try:
        return yaml.load(text, Loader=yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{error.problem or error.context}{line}") from error
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _sections(config: TrainingConfig) -> list[Mapping[str, Any]]:
    """The settings in a training config: its top-level entries, or itself where it has no such entries."""
    try:
        document = _mapping(_read_yaml(config.text))
    except ValueError as error:
        raise UsageError(
            f"The training config {config.name} is not valid YAML: {error}.",
            "Give --training_config the YAML file that the training was configured with.",
        ) from error
    entries: list[Mapping[str, Any]] = [entry for entry in document.values() if isinstance(entry, dict)]
    return entries if entries and len(entries) == len(document) else [document]


def _describes_dataset(config: TrainingConfig) -> bool:
    return all("datasets" in section for section in _sections(config))


def _settings(configs: Sequence[TrainingConfig]) -> list[Mapping[str, Any]]:
    return [section for config in configs for section in _sections(config)]


def _only(settings: Sequence[Mapping[str, Any]], *names: str) -> str | None:
    """The one value that ``settings`` have under ``names``; None where there is none, or more than one."""
    values = {_text(section[name]) for section in settings for name in names if name in section}
    return values.pop() if len(values) == 1 else None


def _number_of(settings: Sequence[Mapping[str, Any]], *names: str) -> float | None:
    text = _only(settings, *names)
    if text is None or not re.fullmatch(r"[+]?[\d_]*\.?\d+(?:[eE][+-]?\d+)?", text, re.ASCII):
        return None
    return _positive(float(text.replace("_", "")))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(filter(None, map(_text, value if isinstance(value, list) else [value])))


def _number(value: Any) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and -_LIMIT < value < _LIMIT else None


def _positive(value: Any) -> float | None:
    number = _number(value)
    return number if number is not None and number > 0 else None


def _count(value: Any) -> int | None:
    number = _positive(value)
    return int(number) if number is not None and number == int(number) else None


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _is_published(name: Any) -> bool:
    """Whether ``name`` can only be meant as a repository on the Hub: NAMESPACE/NAME, and not a folder of a run."""
    return isinstance(name, str) and _is_hub_id(name) and "/" in name and not _RUN_FOLDER.fullmatch(name.split("/")[1])


def _is_folder(name: str, checkpoint: Path) -> bool:
    """Whether ``name`` is a folder, seen from here or from one that holds the checkpoint: there the training ran."""
    return any(os.path.isdir(place / name) for place in (Path(), *checkpoint.absolute().parents))


def _is_hub_id(name: str) -> bool:
    return _HUB_ID.fullmatch(name) is not None


# The sample code


def sample_code(facts: CardFacts) -> str:
    """The program on the card: it loads the published model, and generates from the card's prompt.

    It needs torch and transformers (4.57 or 5), and no accelerate, which ``device_map`` would. Without a repository
    name it loads the folder that it is run in.
    """
    trust = ["trust_remote_code=True"] if facts.trust_remote_code else []
    dtype = f"torch.{facts.dtype.value}" if facts.dtype else '"auto"'
    pipeline = ['"text-generation"', "model=model", "tokenizer=tokenizer", f"dtype={dtype}", *trust]
    prompt = facts.prompt.example if facts.prompt else QUESTION
    if facts.adapter:
        return _adapter_code(facts, facts.adapter)
    return "\n".join(
        [
            "from transformers import AutoTokenizer",
            "import transformers",
            *(["import torch"] if facts.dtype else []),
            "",
            f"model = {_literal(facts.repo_name or '.')}",
            "",
            f"tokenizer = AutoTokenizer.from_pretrained({', '.join(['model', *trust])})",
            *_call("pipeline = transformers.pipeline", pipeline),
            "",
            f"input_text = {_literal(prompt)}",
            "",
            *_call("sequences = pipeline", ["input_text", *_generation_arguments(facts)]),
            "for seq in sequences:",
            "    print(f\"Result: {seq['generated_text']}\")",
            "",
        ]
    )


def _adapter_code(facts: CardFacts, adapter: AdapterFacts) -> str:
    """The same for an adapter: the base is loaded at the commit that it was trained onto, in its own dtype."""
    trust = ["trust_remote_code=True"] if facts.trust_remote_code else []
    base = ["base", f"revision={_literal(adapter.base_revision)}"]
    tokenizer = ["adapter"] if adapter.has_tokenizer else base
    resized = [f"model.resize_token_embeddings({adapter.rows}, mean_resizing=False)"] if adapter.rows else []
    prompt = facts.prompt
    template = ", add_special_tokens=False" if prompt and prompt.is_chat_template else ""
    return "\n".join(
        [
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"base = {_literal(facts.base_model or '')}",
            f"adapter = {_literal(facts.repo_name or '.')}",
            "",
            *_call("tokenizer = AutoTokenizer.from_pretrained", [*tokenizer, *trust]),
            *_call("model = AutoModelForCausalLM.from_pretrained", [*base, 'dtype="auto"', *trust]),
            *resized,
            "model = PeftModel.from_pretrained(model, adapter)",
            "",
            f"input_text = {_literal(prompt.example if prompt else QUESTION)}",
            "",
            f'inputs = tokenizer(input_text, return_tensors="pt"{template})',
            *_call("outputs = model.generate", [*_ADAPTER_INPUTS, *_sampling_arguments(facts)]),
            'print("Result:", tokenizer.decode(outputs[0, inputs.input_ids.shape[1] :]))',
            "",
        ]
    )


_ADAPTER_INPUTS = ("input_ids=inputs.input_ids", "attention_mask=inputs.attention_mask")


def _generation_arguments(facts: CardFacts) -> Iterator[str]:
    prompt = facts.prompt
    if prompt and prompt.is_chat_template:
        yield "add_special_tokens=False"
    yield "return_full_text=False"
    yield from _sampling_arguments(facts)


def _sampling_arguments(facts: CardFacts) -> Iterator[str]:
    prompt = facts.prompt
    yield f"max_new_tokens={_reply_length(facts.context_length)}"
    yield from ("do_sample=True", "top_k=10", "num_return_sequences=1")
    if prompt and prompt.eos_token:
        yield f"eos_token_id={_stop_ids(prompt)}"
        yield "pad_token_id=tokenizer.eos_token_id"


def _reply_length(context_length: int | None) -> int:
    """Tokens to generate: at most half of the context, so that the prompt has room too."""
    return MAX_NEW_TOKENS if context_length is None else max(1, min(MAX_NEW_TOKENS, context_length // 2))


def _stop_ids(prompt: PromptFacts) -> str:
    if prompt.end_of_turn in (None, prompt.eos_token):
        return "tokenizer.eos_token_id"
    return f"[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids({_literal(prompt.end_of_turn or '')})]"


def _call(function: str, arguments: Sequence[str]) -> list[str]:
    return [f"{function}(", *(f"    {argument}," for argument in arguments), ")"]


def _literal(text: str) -> str:
    """``text`` as a Python string in double quotes: JSON's is one, where it does not escape beyond the BMP."""
    return _encodable(json.dumps(text, ensure_ascii=False))


def extract_sample_code(card: str) -> str | None:
    """The first Python block of a card, as it would be copied from there; None where there is none."""
    return next((block[3] for block in _FENCE.finditer(card) if block[2] == "python"), None)


# The card


def render_card(facts: CardFacts, template: Path | None = None) -> str:
    """The card's text, with LF line ends and one newline at the end.

    ``template`` is a file of the user's own; the default template documents what it can use.

    Raises:
        UsageError: the user's template cannot be read or rendered, or a training config is not YAML.
    """
    text = _render(_context(facts), template)
    return _encodable(_lf(text)).strip("\n") + "\n"


def _context(facts: CardFacts) -> dict[str, Any]:
    """The variables of a template."""
    base_model = facts.base_model or ""
    if base_model == facts.repo_name or not _is_hub_id(base_model) or os.path.isdir(base_model):
        facts = replace(facts, base_model=None)
    facts = _without_local_paths(facts)
    configs = facts.training_configs
    return {
        "facts": facts,
        "front_matter": _front_matter(facts),
        "title": _title(facts),
        "training_sentence": _training_sentence(facts),
        "sample_code": sample_code(facts) if facts.pipeline_tag == "text-generation" else None,
        "model_configs": [config for config in configs if not _describes_dataset(config)],
        "dataset_configs": [config for config in configs if _describes_dataset(config)],
    }


def _without_local_paths(facts: CardFacts) -> CardFacts:
    """``facts`` whose texts show, of a path of this machine, its last name."""
    configs = facts.training_configs
    return replace(
        facts,
        datasets=tuple(map(without_local_paths, facts.datasets)),
        training_configs=tuple(config._replace(text=without_local_paths(config.text)) for config in configs),
        train_command=facts.train_command and without_local_paths(facts.train_command),
        export_command=facts.export_command and without_local_paths(facts.export_command),
    )


def _front_matter(facts: CardFacts) -> str:
    fields = {
        "license": facts.license,
        "language": list(facts.languages),
        "library_name": "peft" if facts.adapter else "transformers",
        "pipeline_tag": facts.pipeline_tag,
        "base_model": facts.base_model,
        "base_model_relation": "adapter" if facts.adapter else None,
        "datasets": list(facts.datasets),
        "tags": sorted(set(facts.tags)),
    }
    known = {name: value for name, value in fields.items() if value}
    return yaml.safe_dump(known, sort_keys=False, width=float("inf")).rstrip("\n")


def _title(facts: CardFacts) -> str:
    if facts.repo_name:
        name = facts.repo_name.rpartition("/")[2]
    elif facts.base_model:
        name = f"{facts.base_model.rpartition('/')[2]} fine-tuned"
    else:
        name = facts.architecture or "Fine-tuned model"
    return re.sub(r"([\\`*\[\]<>#|~&])", r"\\\1", " ".join(name.split()))


def _training_sentence(facts: CardFacts) -> str:
    """What the introduction says of the training; empty where nothing is known."""
    training = facts.training
    epochs = _counted(training.epochs, "epoch")
    steps = _counted(training.steps, "step")
    details = []
    if training.learning_rate:
        details.append(f"a learning rate of {training.learning_rate:g}")
    if training.context_length:
        details.append(f"a context length of {training.context_length} tokens")
    phrases = [
        f"on {_enumeration([_dataset(name) for name in facts.datasets])}" if facts.datasets else "",
        f"with a batch size of {training.batch_size}" if training.batch_size else "",
        f"for {epochs} ({steps})" if epochs and steps else f"for {epochs or steps}" if epochs or steps else "",
        f"with {_enumeration(details)}" if details else "",
    ]
    known = " ".join(filter(None, phrases))
    return f"{'It' if facts.base_model else 'This model'} was trained {known}." if known else ""


def _counted(number: float | None, noun: str) -> str:
    if number is None or number < 0.01:
        return ""
    text = f"{round(number, 2):,}".removesuffix(".0")
    return f"{text} {noun}" if text == "1" else f"{text} {noun}s"


def _enumeration(items: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(items[:-1]), items[-1]]))


def _dataset(name: str) -> str:
    return f"[{name}](https://huggingface.co/datasets/{name})" if _is_hub_id(name) else code_span(name)


def code_span(text: str) -> str:
    """``text`` in one line between backticks, more of them than it holds in a row."""
    line = " ".join(text.split())
    ticks = "`" * (_longest_run(line) + 1)
    return f"{ticks} {line} {ticks}" if "`" in line else f"{ticks}{line}{ticks}"


def fenced(text: str, language: str = "") -> str:
    """``text`` as a code block, between fences that are longer than any run of backticks in it."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n" + text.removesuffix("\n") + f"\n{fence}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _lf(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _encodable(text: str) -> str:
    """``text`` with lone surrogates, which JSON can hold and UTF-8 cannot, as escapes."""
    return text.encode("utf-8", errors="backslashreplace").decode()


def _render(context: Mapping[str, Any], template: Path | None) -> str:
    if template is None:
        return _environment().from_string(DEFAULT_TEMPLATE.read_text(encoding="utf-8")).render(context)
    try:
        return _environment().from_string(template.read_text(encoding="utf-8")).render(context)
    except Exception as error:  # a template is a program: it can fail in any way
        raise UsageError(
            f"The card template {template.name} does not render: {_where(error)}{_reason(error)}.",
            "Correct it; the default template's first lines say which variables and filters there are.",
        ) from error


def _environment() -> jinja2.Environment:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"code": code_span, "fence": fenced}
    return environment


def _where(error: Exception) -> str:
    """The line of a template in which ``error`` was raised; Jinja2 names a template without a file ``<template>``."""
    from jinja2 import TemplateSyntaxError

    if isinstance(error, TemplateSyntaxError):
        return f"line {error.lineno}: "
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    return f"line {lines[-1]}: " if lines else ""


def _reason(error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return " ".join((reason or type(error).__name__).split()).rstrip(".")
