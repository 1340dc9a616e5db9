from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from exporter.card import (
    DEFAULT_TEMPLATE,
    CardFacts,
    PromptFacts,
    TrainingConfig,
    TrainingFacts,
    code_span,
    extract_sample_code,
    fenced,
    read_card_metadata,
    read_training_facts,
    render_card,
    sample_code,
)
from exporter.errors import CheckpointError, UsageError
from exporter.tensors import DType
from exporter.tokenizer import QUESTION

MODEL_CONFIG = """\
falcon-7b:
  dtype: bf16
  log_dir: "falcon_log_7b"
  learning_rate: 1e-5
  model_name: "tiiuae/falcon-7b"
  deepspeed_config: configs/zero_config.json
  output_dir: falcon
  max_length: 2048
  num_train_epochs: 8
  residual_dropout: 0.2
"""
DATASET_CONFIG = """\
oasst-top1:
  # oasst_export: 11123 (100.00%)
  datasets:
    - oasst_export:
        lang: "bg,ca,cs,da,de,en,es" # sft-8.0
        input_file_path: 2023-06-02_oasst_all_labels.jsonl.gz
        top_k: 1
"""
CONFIGS = (TrainingConfig("oasst-top1.yaml", DATASET_CONFIG), TrainingConfig("falcon-7b.yaml", MODEL_CONFIG))

OASST = PromptFacts(
    prompt_format="oasst",
    example=f"<|prompter|>{QUESTION}<|endoftext|><|assistant|>",
    special_tokens=("<|prompter|>", "<|assistant|>"),
    eos_token="<|endoftext|>",
)
CHATML = PromptFacts(
    prompt_format="chatml",
    example=f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n",
    special_tokens=("<|im_start|>", "<|im_end|>"),
    eos_token="<|endoftext|>",
    end_of_turn="<|im_end|>",
)
FACTS = CardFacts(
    repo_name="OpenAssistant/falcon-7b-sft-top1",
    base_model="tiiuae/falcon-7b",
    license="apache-2.0",
    languages=("en", "no"),
    datasets=("OpenAssistant/oasst1",),
    tags=("sft", "deepspeed", "sft"),
    pipeline_tag="text-generation",
    architecture="FalconForCausalLM",
    dtype=DType.BF16,
    parameters=7217189760,
    context_length=2048,
    trust_remote_code=True,
    prompt=OASST,
    training=TrainingFacts(epochs=8.0, steps=696, batch_size=128, learning_rate=1e-5, context_length=2048),
    training_configs=CONFIGS,
    train_command="deepspeed trainer_sft.py --configs defaults falcon-7b oasst-top1 --deepspeed",
    export_command="python export_model.py --dtype bf16 --auth_token <auth_token> <output_path>",
)

REFERENCE_PROMPTING = """\
Two special tokens are used to mark the beginning of user and assistant turns: <|prompter|> and <|assistant|>.
Each turn ends with a <|endoftext|> token.
Input prompt example:
<|prompter|>What is a meme, and what's the history behind this word?<|endoftext|><|assistant|>
The input ends with the <|assistant|> token to signal that the model should start generating the assistant reply.
"""
REFERENCE_CODE = """\
from transformers import AutoTokenizer
import transformers
import torch

model = "OpenAssistant/falcon-7b-sft-top1"

tokenizer = AutoTokenizer.from_pretrained(model)
pipeline = transformers.pipeline(
    "text-generation",
    model=model,
    tokenizer=tokenizer,
    torch_dtype=torch.bfloat16,
    trust_remote_code=True,
    device_map="auto",
)

input_text="<|prompter|>What is a meme, and what's the history behind this word?<|endoftext|><|assistant|>"

sequences = pipeline(
    input_text,
    max_length=500,
    do_sample=True,
    return_full_text=False,
    top_k=10,
    num_return_sequences=1,
    eos_token_id=tokenizer.eos_token_id,
)
for seq in sequences:
    print(f"Result: {seq['generated_text']}")
"""
"""The sample code of the OpenAssistant model card that users know."""


def sections(card: str) -> dict[str, str]:
    """Heading → text, outside of code blocks."""
    found: dict[str, list[str]] = {"": []}
    heading, fence = "", ""
    for line in card.splitlines():
        run = re.match("`{3,}", line)
        if run and not fence:
            fence = run[0]
        elif fence and line.startswith(fence):
            fence = ""
        elif not fence and re.match("#+ ", line):
            heading = line
            found[heading] = []
            continue
        found[heading].append(line)
    return {heading: "\n".join(lines).strip() for heading, lines in found.items()}


def words(markdown: str) -> list[str]:
    return markdown.replace("`", "").split()


# The sections


def test_a_full_card_has_the_sections_of_the_reference_in_its_order() -> None:
    card = ModelCard(render_card(FACTS))
    assert list(sections(card.text))[1:] == [
        "# falcon-7b-sft-top1",
        "## Model Details",
        "## Prompting",
        "## Sample Code",
        "## Configuration Details",
    ]


def test_the_introduction_says_what_was_tuned_and_how_from_facts() -> None:
    assert sections(render_card(FACTS))["# falcon-7b-sft-top1"] == (
        "This model is a fine-tuning of [tiiuae/falcon-7b](https://huggingface.co/tiiuae/falcon-7b). It was trained on "
        "[OpenAssistant/oasst1](https://huggingface.co/datasets/OpenAssistant/oasst1) with a batch size of 128 for "
        "8 epochs (696 steps) with a learning rate of 1e-05 and a context length of 2048 tokens."
    )


@pytest.mark.parametrize(
    ("training", "datasets", "sentence"),
    [
        (TrainingFacts(epochs=1.0), (), "This model was trained for 1 epoch."),
        (TrainingFacts(epochs=4 / 3, steps=1), (), "This model was trained for 1.33 epochs (1 step)."),
        (TrainingFacts(epochs=0.001, steps=1), (), "This model was trained for 1 step."),
        (TrainingFacts(steps=12000), (), "This model was trained for 12,000 steps."),
        (TrainingFacts(), ("my data",), "This model was trained on `my data`."),
        (TrainingFacts(zero_stage=2), (), ""),
    ],
)
def test_the_training_sentence_has_only_what_is_known(
    training: TrainingFacts, datasets: tuple[str, ...], sentence: str
) -> None:
    card = render_card(CardFacts(training=training, datasets=datasets))
    assert sections(card)["# Fine-tuned model"] == sentence


def test_the_oasst_prompting_section_has_the_words_of_the_reference() -> None:
    assert words(sections(render_card(FACTS))["## Prompting"]) == words(REFERENCE_PROMPTING)


def test_another_formats_prompting_section_shows_its_prompt_and_its_end_of_turn() -> None:
    prompting = sections(render_card(replace(FACTS, prompt=CHATML)))["## Prompting"]
    assert f"```\n{CHATML.example}```" in prompting
    assert "A reply ends with a `<|im_end|>` token." in prompting
    assert "Two special tokens" not in prompting


def test_the_training_configs_stand_as_they_are_under_model_and_dataset() -> None:
    details = sections(render_card(FACTS))["## Configuration Details"]
    assert details == "\n\n".join(
        [
            f"Model:\n\n```yaml\n{MODEL_CONFIG}```",
            f"Dataset:\n\n```yaml\n{DATASET_CONFIG}```",
            f"Train command:\n\n```bash\n{FACTS.train_command}\n```",
            f"Export command:\n\n```bash\n{FACTS.export_command}\n```",
        ]
    )


def test_the_model_details_state_facts_only() -> None:
    training = TrainingFacts(optimizer="AdamW", zero_stage=2, train_loss=0.0, best_metric=("eval_loss", 1.25, 80))
    facts = CardFacts(parameters=7217189760, dtype=DType.BF16, languages=("en", "no"), training=training)
    assert sections(render_card(facts))["## Model Details"].splitlines() == [
        "- **Parameters:** 7,217,189,760",
        "- **Data type:** `bfloat16`",
        "- **Language:** `en`, `no`",
        "- **Optimizer:** `AdamW`",
        "- **ZeRO stage:** 2",
        "- **Last training loss:** 0",
        "- **Best `eval_loss`:** 1.25 (step 80)",
    ]


def test_without_facts_only_the_title_is_left() -> None:
    assert render_card(CardFacts()) == "---\nlibrary_name: transformers\n---\n\n# Fine-tuned model\n"


def test_there_are_never_two_empty_lines_nor_spaces_at_a_lines_end() -> None:
    for facts in (FACTS, replace(FACTS, prompt=CHATML), replace(FACTS, training_configs=(), train_command=None)):
        assert not re.search(r"\n\n\n|[ \t]\n|\r", render_card(facts))
        assert render_card(facts).endswith("`\n")


def test_a_model_is_not_called_a_fine_tuning_of_itself_or_of_a_local_folder() -> None:
    for name in (FACTS.repo_name, "/data/falcon", "../falcon", "a/b/c"):
        card = render_card(replace(FACTS, base_model=name))
        assert "fine-tuning" not in card and "Base model" not in card and "base_model" not in card


# The front matter


def test_the_hub_library_reads_the_front_matter_that_was_meant() -> None:
    assert ModelCard(render_card(FACTS)).data.to_dict() == {
        "license": "apache-2.0",
        "language": ["en", "no"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "tiiuae/falcon-7b",
        "datasets": ["OpenAssistant/oasst1"],
        "tags": ["deepspeed", "sft"],
    }


@pytest.mark.parametrize(
    "text", ["x\n---\nlicense: mit", "x\r---\rgated: true", "a: b # c", "\u2028---\u2028é", "- [{"]
)
def test_no_fact_can_add_to_the_front_matter_or_end_it(text: str) -> None:
    facts = CardFacts(license=text, tags=(text,), datasets=(text,), repo_name=f"a/{text}", train_command=text)
    data = ModelCard(render_card(facts)).data.to_dict()
    assert data == {"license": text, "library_name": "transformers", "tags": [text], "datasets": [text]}


# Quoting


HOSTILE = "```\n````` \n# Heading\n<script>\n~~~\n`x` \x00 \u2028 \"\"\" ''' \\ \ud800 😀 {{ 7 * 7 }}"


def blocks(card: str) -> list[str]:
    """The code blocks of a card, told apart by CommonMark's rule: a fence is closed by one that is at least as long."""
    found: list[str] = []
    fence = ""
    for line in card.split("\n"):
        closing = re.fullmatch(r" {0,3}(`{3,})\s*", line)
        if not fence and (opening := re.match(r" {0,3}(`{3,})[^`]*$", line)):
            fence = opening[1]
            found.append("")
        elif fence and closing and len(closing[1]) >= len(fence):
            fence = ""
        elif fence:
            found[-1] += line + "\n"
    return found


def test_no_text_breaks_out_of_its_code_block() -> None:
    prompt = PromptFacts(prompt_format="own", example=HOSTILE)
    config = TrainingConfig("x.yaml", "x: |\n  ```\n  ````` \n  # Heading\n  <script>\n")
    facts = replace(FACTS, prompt=prompt, train_command=HOSTILE, training_configs=(config,))
    card = render_card(facts)
    printed = HOSTILE.replace("\ud800", "\\ud800") + "\n"
    assert blocks(card) == [
        printed,
        sample_code(facts),
        config.text,
        printed,
        f"{FACTS.export_command}\n",
    ]
    assert list(sections(card))[1:] == list(sections(render_card(FACTS)))[1:]
    card.encode()


def test_names_stay_in_their_line() -> None:
    name = "evil\n\n# Heading\n`tick` ``two`` <b>"
    card = render_card(replace(FACTS, architecture=name, license=name, repo_name=f"a/{name}", datasets=(name,)))
    headings = [heading for heading in sections(card) if heading.startswith("## ")]
    assert headings == ["## Model Details", "## Prompting", "## Sample Code", "## Configuration Details"]
    assert "- **Architecture:** ``` evil # Heading `tick` ``two`` <b> ```\n" in card


@pytest.mark.parametrize(("text", "span"), [("a", "`a`"), ("`", "`` ` ``"), ("a``b", "``` a``b ```")])
def test_a_code_span_has_more_backticks_than_its_text(text: str, span: str) -> None:
    assert code_span(text) == span


@pytest.mark.parametrize(("text", "ticks"), [("", 3), ("`" * 2, 3), ("`" * 3, 4), ("x ````` y", 6)])
def test_a_fence_is_longer_than_any_run_of_backticks_in_its_text(text: str, ticks: int) -> None:
    assert fenced(text, "yaml") == f"{'`' * ticks}yaml\n{text}\n{'`' * ticks}"


def test_the_strings_in_the_sample_code_are_the_facts() -> None:
    facts = replace(FACTS, repo_name='a/"b"', prompt=PromptFacts(prompt_format="own", example=HOSTILE))
    tree = ast.parse(sample_code(facts))
    assigned = {
        statement.targets[0].id: statement.value.value
        for statement in tree.body
        if isinstance(statement, ast.Assign)
        and isinstance(statement.targets[0], ast.Name)
        and isinstance(statement.value, ast.Constant)
    }
    assert assigned == {"model": 'a/"b"', "input_text": HOSTILE}


# The sample code


def test_the_sample_code_is_the_references_but_for_what_does_not_run_everywhere() -> None:
    ours, reference = (ast.unparse(ast.parse(code)).splitlines() for code in (sample_code(FACTS), REFERENCE_CODE))
    arguments = [re.findall(r"[\w.]+=[^,()]+|'[\w-]+'", " ".join(lines)) for lines in (ours, reference)]
    assert set(arguments[1]) - set(arguments[0]) == {
        "torch_dtype=torch.bfloat16",
        "device_map='auto'",
        "max_length=500",
    }
    assert set(arguments[0]) - set(arguments[1]) == {
        "dtype=torch.bfloat16",
        "add_special_tokens=False",
        "max_new_tokens=500",
        "pad_token_id=tokenizer.eos_token_id",
    }
    assert [line for line in ours if "(" not in line] == [line for line in reference if "(" not in line]
    assert ours[-2:] == reference[-2:]


def test_the_sample_code_trusts_remote_code_only_where_it_was_allowed() -> None:
    assert sample_code(FACTS).count("trust_remote_code=True") == 2
    assert "trust_remote_code" not in sample_code(replace(FACTS, trust_remote_code=False))


@pytest.mark.parametrize(("context_length", "tokens"), [(None, 500), (2048, 500), (64, 32), (1, 1)])
def test_the_sample_code_leaves_room_for_the_prompt(context_length: int | None, tokens: int) -> None:
    assert f"max_new_tokens={tokens}," in sample_code(replace(FACTS, context_length=context_length))


def test_the_code_is_taken_from_the_card_as_it_was_printed() -> None:
    example = f"````python\nraise SystemExit\n````\n```python\n{QUESTION}"
    for prompt in (OASST, CHATML, replace(OASST, example=example)):
        facts = replace(FACTS, prompt=prompt)
        assert extract_sample_code(render_card(facts)) == sample_code(facts)
    assert extract_sample_code(render_card(CardFacts())) is None


def test_only_a_text_generator_gets_sample_code() -> None:
    assert "## Sample Code" not in render_card(replace(FACTS, pipeline_tag="text-classification"))


def make_tokenizer() -> Any:
    """A byte-level BPE whose ``<|im_end|>`` is not special, so that it shows in a decoded text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|prompter|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([QUESTION] * 9, trainer)
    tokenizer.add_tokens(["<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def save_llama(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=0, **sizes)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_falcon_that_says(token: str, folder: Path) -> None:
    """A Falcon whose last layer norm is constant, and whose head knows one token."""
    import torch
    from transformers import FalconConfig, FalconForCausalLM

    tokenizer = make_tokenizer()
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    model = FalconForCausalLM(FalconConfig(vocab_size=len(tokenizer), tie_word_embeddings=False, **ids, **sizes))
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[tokenizer.convert_tokens_to_ids(token)] = 1.0
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run_as_printed(card: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the card's code in ``folder``, in an environment without accelerate and without a network."""
    (folder / "sample.py").write_text(extract_sample_code(card) or "", encoding="utf-8")
    without_accelerate = "import runpy, sys; sys.modules['accelerate'] = None; runpy.run_path('sample.py')"
    return subprocess.run(
        [sys.executable, "-c", without_accelerate],
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_sample_code_runs_as_printed_and_without_a_warning(tmp_path: Path) -> None:
    save_llama(tmp_path / "OpenAssistant" / "falcon-7b-sft-top1")
    result = run_as_printed(render_card(replace(FACTS, context_length=64)), tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Result: ")
    assert not re.search(r"warn|deprecat|ignored|pad_token|max_length", result.stderr, re.IGNORECASE), result.stderr


def test_the_sample_code_of_an_unnamed_model_runs_in_its_folder_and_stops_at_the_end_of_turn(tmp_path: Path) -> None:
    save_falcon_that_says("<|im_end|>", tmp_path)
    facts = replace(FACTS, repo_name=None, prompt=CHATML, dtype=None, trust_remote_code=False, context_length=64)
    result = run_as_printed(render_card(facts), tmp_path)
    assert result.stdout == "Result: <|im_end|>\n", result.stderr


# The user's own template


def test_a_template_of_ones_own_replaces_the_default_and_can_use_its_variables(tmp_path: Path) -> None:
    own = tmp_path / "own.jinja"
    own.write_text("---\r\n{{ front_matter }}\r\n---\r\n{{ title }} {{ facts.prompt.example | fence('text') }}\r\n\r\n")
    card = render_card(FACTS, own)
    assert card.endswith(f"---\nfalcon-7b-sft-top1 ```text\n{OASST.example}\n```\n")
    assert ModelCard(card).data.license == "apache-2.0"


def test_the_default_template_is_a_template_of_ones_own_too(tmp_path: Path) -> None:
    own = tmp_path / "own.jinja"
    own.write_bytes(DEFAULT_TEMPLATE.read_bytes())
    assert render_card(FACTS, own) == render_card(FACTS)


def test_the_default_template_documents_every_fact() -> None:
    documentation = DEFAULT_TEMPLATE.read_text().partition("#}")[0]
    names = {name for kind in (CardFacts, PromptFacts, TrainingFacts) for name in kind.__dataclass_fields__}
    undocumented = {name for name in names if not re.search(rf"\.{name}\s", documentation)}
    assert undocumented == {"training_configs"}, "these have variables of their own"


@pytest.mark.parametrize(
    ("template", "line", "reason"),
    [
        ("a\n{% if %}", 2, "Expected an expression"),
        ("a\n\n{{ licence }}", 3, "'licence' is undefined"),
        ("\n{{ facts.licence }}", 2, "licence"),
        ("{{ 1 / 0 }}", 1, "division by zero"),
        ("\n{{ facts.__class__.__mro__ }}", 2, "unsafe"),
        ("{% include 'x' %}", 1, "no loader"),
        ("{{ model_configs.append(1) }}", 1, "of .list. object is unsafe"),
    ],
)
def test_a_bad_template_is_named_with_its_line(tmp_path: Path, template: str, line: int, reason: str) -> None:
    own = tmp_path / "own.jinja"
    own.write_text(template)
    with pytest.raises(UsageError, match=rf"own\.jinja does not render: line {line}: .*{reason}") as caught:
        render_card(FACTS, own)
    assert "\n" not in caught.value.message and str(tmp_path) not in caught.value.message


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_template_that_cannot_be_read_is_named_without_its_folder(tmp_path: Path, content: bytes | None) -> None:
    own = tmp_path / "own.jinja"
    if content is not None:
        own.write_bytes(content)
    with pytest.raises(UsageError, match=r"own\.jinja") as caught:
        render_card(FACTS, own)
    assert str(tmp_path) not in caught.value.message


# What the training says


def save_trainer_state(folder: Path, **fields: Any) -> None:
    from transformers import TrainerState

    folder.mkdir(exist_ok=True)
    TrainerState(**fields).save_to_json(str(folder / "trainer_state.json"))


DEEPSPEED_CONFIG: dict[str, Any] = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 1,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
    "zero_optimization": {"stage": 2},
    "bf16": {"enabled": True},
    "fp16": {"enabled": False},
    "steps_per_print": float("inf"),
}
"""As the Trainer's DeepSpeed checkpoints hold it."""


def test_the_trainers_state_says_how_long_it_trained_and_its_last_losses(tmp_path: Path) -> None:
    logs: list[dict[str, float]] = [
        {"epoch": 1.0, "loss": 3.25, "step": 59},
        {"epoch": 1.0, "eval_loss": 3.25, "step": 60},
        {"epoch": 2.0, "loss": 2.5, "step": 120},
        {"epoch": 2.0, "eval_loss": 3.5, "step": 120},
        {"train_loss": 9.0, "step": 120},
    ]
    save_trainer_state(
        tmp_path, epoch=2.0, global_step=120, train_batch_size=4, log_history=logs, best_metric=3.25, num_train_epochs=9
    )
    assert read_training_facts(tmp_path, None, None) == TrainingFacts(
        epochs=2.0, steps=120, micro_batch_size=4, train_loss=2.5, eval_loss=3.5, best_metric=("eval_loss", 3.25, 60)
    )


def test_the_deepspeed_config_says_batch_sizes_optimizer_stage_and_precision(tmp_path: Path) -> None:
    assert read_training_facts(tmp_path, None, DEEPSPEED_CONFIG) == TrainingFacts(
        batch_size=8,
        micro_batch_size=4,
        gradient_accumulation=1,
        learning_rate=0.01,
        optimizer="AdamW",
        zero_stage=2,
        precision="bf16",
    )


def test_values_that_are_not_what_they_should_be_are_no_facts(tmp_path: Path) -> None:
    state = {"epoch": "2", "global_step": 10**400, "log_history": [1, {"loss": float("nan")}], "train_batch_size": True}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    config = {"train_batch_size": "auto", "optimizer": object(), "zero_optimization": {"stage": "3"}, "bf16": 1}
    assert read_training_facts(tmp_path, tmp_path, config) == TrainingFacts()


def test_the_runs_state_counts_only_for_the_checkpoint_of_its_step(tmp_path: Path) -> None:
    save_trainer_state(tmp_path, global_step=120)
    for name, steps in (("checkpoint-120", 120), ("checkpoint-60", None)):
        (tmp_path / name).mkdir()
        assert read_training_facts(tmp_path / name, tmp_path, None).steps == steps


def test_the_training_configs_give_what_nothing_else_says(tmp_path: Path) -> None:
    wanted = read_training_facts(tmp_path, None, None, CONFIGS)
    assert wanted == TrainingFacts(epochs=8.0, learning_rate=1e-5, context_length=2048)
    save_trainer_state(tmp_path, epoch=2.5, global_step=10)
    done = read_training_facts(tmp_path, None, DEEPSPEED_CONFIG, CONFIGS)
    assert (done.epochs, done.learning_rate) == (2.5, 0.01)


def test_a_setting_with_two_values_is_no_fact(tmp_path: Path) -> None:
    other = TrainingConfig("other.yaml", "pythia:\n  num_train_epochs: 3\n  model_name: EleutherAI/pythia-70m\n")
    assert read_training_facts(tmp_path, None, None, (*CONFIGS, other)).epochs is None
    assert read_card_metadata(tmp_path, {}, (*CONFIGS, other)).base_model is None


def test_a_broken_trainer_state_is_named(tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text('{"epoch": 1')
    with pytest.raises(CheckpointError, match=r"trainer_state\.json is not valid JSON"):
        read_training_facts(tmp_path, None, None)


@pytest.mark.parametrize("text", ["a: [", "a: 1\n---\nb: 2", "[" * 9000, "a: \x00"])
def test_a_training_config_that_is_not_yaml_is_the_users_mistake(text: str) -> None:
    with pytest.raises(UsageError, match=r"The training config x\.yaml is not valid YAML: [^\n]+\.$"):
        render_card(CardFacts(training_configs=(TrainingConfig("x.yaml", text),)))


# What the checkpoint says of itself


def test_the_checkpoints_own_card_gives_license_language_datasets_and_base_model(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(render_card(FACTS))
    metadata = read_card_metadata(tmp_path, {"_name_or_path": "other/model"})
    assert (metadata.license, metadata.languages) == ("apache-2.0", ("en", "no"))
    assert (metadata.datasets, metadata.base_model) == (("OpenAssistant/oasst1",), "tiiuae/falcon-7b")


def test_a_language_is_not_read_as_a_truth_value(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"\xef\xbb\xbf---\r\nlanguage: no\r\nlicense: mit\r\n---\r\n# x\r\n")
    metadata = read_card_metadata(tmp_path, {})
    assert (metadata.languages, metadata.license) == (("no",), "mit")


def test_without_a_card_nothing_is_guessed(tmp_path: Path) -> None:
    metadata = read_card_metadata(tmp_path, {"model_type": "falcon"})
    assert metadata == read_card_metadata(tmp_path, {"_name_or_path": 7})
    assert (metadata.license, metadata.languages, metadata.datasets, metadata.base_model) == (None, (), (), None)


def test_the_base_model_is_asked_of_the_adapter_then_the_config_then_the_training_config(tmp_path: Path) -> None:
    config = {"_name_or_path": "config/model"}
    assert read_card_metadata(tmp_path, {}, CONFIGS).base_model == "tiiuae/falcon-7b"
    assert read_card_metadata(tmp_path, config, CONFIGS).base_model == "config/model"
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "adapter/model"}')
    assert read_card_metadata(tmp_path, config, CONFIGS).base_model == "adapter/model"


@pytest.mark.parametrize(
    "name", ["/data/falcon", "./a/b", "../b", "~/b", "a\\b", "a/b/c", "out/checkpoint-80", "falcon", "a/..", "", None]
)
def test_what_may_be_a_local_path_is_no_base_model(tmp_path: Path, name: str | None) -> None:
    assert read_card_metadata(tmp_path, {"_name_or_path": name}).base_model is None


@pytest.mark.parametrize("text", ["license: [", "[" * 9000, "{a: b}: c", "a: \x00"])
def test_a_broken_front_matter_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(f"---\n{text}\n---\n")
    with pytest.raises(CheckpointError, match=r"The front matter of README\.md is not valid YAML: [^\n]+\.$"):
        read_card_metadata(tmp_path, {})


@pytest.mark.parametrize(
    "text",
    [
        "license: !!python/object/apply:os.system ['touch canary']",
        "<<: {license: merged}",
        "license: !!int ''",
    ],
)
def test_a_hostile_front_matter_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text(f"---\n{text}\n---\n")
    assert read_card_metadata(tmp_path, {}).license is None
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_a_card_that_is_a_link_out_of_the_checkpoint_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("---\nlicense: secret\n---\n")
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"README\.md is a symbolic link that leaves"):
        read_card_metadata(folder, {})
