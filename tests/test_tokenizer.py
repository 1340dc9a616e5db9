from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, GPT2TokenizerFast, PreTrainedTokenizerFast

from exporter.errors import CheckpointError, ExportError, RefusedError, UsageError
from exporter.tokenizer import Vocabulary, embedding_rows, settle_vocabulary

QUESTION = "What is a meme, and what's the history behind this word?"
PROMPT = f"<|prompter|>{QUESTION}<|endoftext|><|assistant|>"
USER = [{"role": "user", "content": QUESTION}]
CHAT = [*USER, {"role": "assistant", "content": "An idea."}]
TEXTS = [QUESTION, "A meme is an idea that spreads.", "hello world, hello again"] * 5
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
GPT2_CONFIG = {"model_type": "gpt2", "eos_token_id": 0, "bos_token_id": 0}


def byte_level(special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def falcon(folder: Path, **options: Any) -> None:
    special = ["<|endoftext|>", *options.pop("special", [])]
    PreTrainedTokenizerFast(tokenizer_object=byte_level(special), eos_token="<|endoftext|>", **options).save_pretrained(
        folder
    )


def gpt2(folder: Path) -> None:
    slow = folder / "slow"
    slow.mkdir()
    byte_level(["<|endoftext|>"]).model.save(str(slow))
    (slow / "tokenizer_config.json").write_text("{}")
    GPT2TokenizerFast.from_pretrained(slow).save_pretrained(folder)


def llama(folder: Path) -> None:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "<|endoftext|>"]
    tokenizer.train_from_iterator(
        TEXTS, trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>")
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="<|endoftext|>"
    ).save_pretrained(folder)


def wordpiece(folder: Path) -> None:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=special))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", eos_token="<|endoftext|>"
    ).save_pretrained(folder)


KINDS: dict[str, Callable[[Path], None]] = {"falcon": falcon, "gpt2": gpt2, "llama": llama, "wordpiece": wordpiece}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A byte-level tokenizer, as Falcon has it."""
    path = tmp_path / "checkpoint"
    path.mkdir()
    falcon(path)
    return path


def settle(folder: Path, prompt_format: str = "auto", **options: Any) -> Vocabulary:
    options = {"config": {"model_type": "falcon"}, "generation_config": None, **options}
    return settle_vocabulary(folder, prompt_format=prompt_format, **options)


def write(vocabulary: Vocabulary, folder: Path, config: dict[str, Any] | None = None) -> Path:
    for name, content in vocabulary.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "falcon"}))
    return folder


def edit(folder: Path, name: str, **keys: Any) -> None:
    path = folder / name
    document = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(document | keys, indent=2, ensure_ascii=False) + "\n")


def failure(folder: Path, prompt_format: str = "auto", **options: Any) -> ExportError:
    with pytest.raises(ExportError) as caught:
        settle(folder, prompt_format, **options)
    message = caught.value.message
    assert "\n" not in message and str(folder.parent) not in message and caught.value.hint
    return caught.value


@pytest.mark.parametrize("kind", KINDS)
def test_oasst_tokens_are_single_special_ids_for_transformers_and_come_back(kind: str, tmp_path: Path) -> None:
    (source := tmp_path / "checkpoint").mkdir()
    KINDS[kind](source)
    vocabulary = settle(source)
    tokenizer = AutoTokenizer.from_pretrained(write(vocabulary, tmp_path / "export"))
    assert (vocabulary.prompt_format, vocabulary.added) == ("oasst", ("<|prompter|>", "<|assistant|>"))
    assert len(tokenizer) == vocabulary.size
    for token in ("<|prompter|>", "<|assistant|>", "<|endoftext|>"):
        (number,) = tokenizer.encode(token, add_special_tokens=False)
        assert number < vocabulary.size and tokenizer.decode([number]).strip() == token
        assert token in tokenizer.all_special_tokens
        assert tokenizer.decode([number], skip_special_tokens=True) == ""
        assert tokenizer.added_tokens_decoder[number].special
        assert token not in vocabulary.added or not tokenizer.added_tokens_decoder[number].normalized
    assert tokenizer.eos_token_id == vocabulary.eos_id


@pytest.mark.parametrize("kind", KINDS)
def test_new_ids_are_those_that_transformers_gives_and_old_texts_keep_theirs(kind: str, tmp_path: Path) -> None:
    (source := tmp_path / "checkpoint").mkdir()
    KINDS[kind](source)
    exported = AutoTokenizer.from_pretrained(write(settle(source), tmp_path / "export"))
    (source / "config.json").write_text('{"model_type": "falcon"}')
    reference = AutoTokenizer.from_pretrained(source)
    before = reference(TEXTS).input_ids
    reference.add_tokens(["<|prompter|>", "<|assistant|>"], special_tokens=True)
    assert exported.get_vocab() == reference.get_vocab()
    assert exported(TEXTS).input_ids == before


def test_the_chat_template_renders_the_prompt_of_the_reference_card(folder: Path, tmp_path: Path) -> None:
    vocabulary = settle(folder)
    tokenizer = AutoTokenizer.from_pretrained(write(vocabulary, tmp_path / "export"))
    assert tokenizer.apply_chat_template(USER, tokenize=False, add_generation_prompt=True) == PROMPT
    assert vocabulary.render(USER) == PROMPT
    assert vocabulary.render(CHAT, add_generation_prompt=False) == (
        f"<|prompter|>{QUESTION}<|endoftext|><|assistant|>An idea.<|endoftext|>"
    )
    ids = tokenizer(PROMPT).input_ids
    assert tokenizer.convert_ids_to_tokens([ids[0], ids[-2], ids[-1]]) == [
        "<|prompter|>",
        "<|endoftext|>",
        "<|assistant|>",
    ]
    assert vocabulary.end_of_turn == vocabulary.eos_token == "<|endoftext|>"


def test_oasst_has_no_system_role(folder: Path) -> None:
    vocabulary = settle(folder)
    with pytest.raises(RefusedError, match="roles user and assistant, but no role system"):
        vocabulary.render([{"role": "system", "content": "Be brief."}, *USER])


def test_only_the_keys_that_must_change_change(folder: Path) -> None:
    edit(folder, "tokenizer_config.json", zebra={"b": 1, "a": [None, "ü"]}, model_max_length=2048)
    vocabulary = settle(folder)
    for name, changed in {
        "tokenizer.json": {"added_tokens"},
        "tokenizer_config.json": {
            "additional_special_tokens",
            "added_tokens_decoder",
            "extra_special_tokens",
            "tokenizer_class",
        },
    }.items():
        before, after = json.loads((folder / name).read_text()), json.loads(vocabulary.files[name])
        kept = [key for key in before if key not in changed]
        assert [key for key in after if key not in changed] == kept
        assert all(after[key] == before[key] for key in kept)
        assert vocabulary.files[name][-1:] == (folder / name).read_bytes()[-1:]
    assert "ü".encode() in vocabulary.files["tokenizer_config.json"]


def test_settling_an_export_again_changes_no_byte_and_adds_nothing(folder: Path, tmp_path: Path) -> None:
    for prompt_format in ("oasst", "chatml", "none"):
        first = settle(folder, prompt_format, special_tokens=["<tool>"])
        again = settle(write(first, tmp_path / prompt_format), prompt_format, special_tokens=["<tool>"])
        assert again.files == first.files and again.added == () and again.size == first.size
        assert again.prompt_format == first.prompt_format and again.eos_id == first.eos_id


def test_a_tokenizer_that_needs_no_edit_is_copied_byte_for_byte(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "auto_map": {"AutoTokenizer": ["mine.Slow", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(json.loads((folder / "tokenizer.json").read_text())))
    files = settle(folder, "none").files
    assert files == {name: (folder / name).read_bytes() for name in files}
    assert {"tokenizer.json", "tokenizer_config.json"} <= files.keys()


def test_known_tokens_keep_their_ids_and_their_template(tmp_path: Path) -> None:
    template = "{% for m in messages %}<|prompter|> {{ m.content }}{% endfor %}"
    falcon(tmp_path, special=["<|assistant|>", "<|prompter|>"])
    (tmp_path / "chat_template.jinja").write_text(template)
    vocabulary = settle(tmp_path)
    assert (vocabulary.prompt_format, vocabulary.added, vocabulary.chat_template) == ("oasst", (), template)
    library = Tokenizer.from_buffer(vocabulary.files["tokenizer.json"])
    assert (library.token_to_id("<|assistant|>"), library.token_to_id("<|prompter|>")) == (1, 2)
    assert vocabulary.files["tokenizer.json"] == (tmp_path / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("entry", ["vocabulary", "not special"])
def test_known_ordinary_tokens_become_special_with_the_same_ids(entry: str, tmp_path: Path) -> None:
    (source := tmp_path / "checkpoint").mkdir()
    falcon(source, special=["<|assistant|>", "<|prompter|>"])
    added = json.loads((source / "tokenizer.json").read_text())["added_tokens"]
    if entry == "vocabulary":
        added = [token for token in added if token["content"] == "<|endoftext|>"]
    else:
        added = [token | {"special": token["content"] == "<|endoftext|>", "normalized": True} for token in added]
    edit(source, "tokenizer.json", added_tokens=added)
    vocabulary = settle(source)
    tokenizer = AutoTokenizer.from_pretrained(write(vocabulary, tmp_path / "export"))
    assert tokenizer.encode("<|assistant|>") == [1] and tokenizer.encode("<|prompter|>") == [2]
    assert tokenizer.decode([1, 2], skip_special_tokens=True) == "" and vocabulary.added == ()


def test_auto_keeps_the_template_of_a_tokenizer_without_the_oasst_tokens(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    vocabulary = settle(folder)
    assert (vocabulary.prompt_format, vocabulary.added) == ("own", ())
    assert vocabulary.render(USER) == QUESTION


def test_a_replaced_template_leaves_no_other_one_behind(folder: Path, tmp_path: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    edit(folder, "tokenizer_config.json", chat_template=[{"name": "default", "template": "old"}])
    vocabulary = settle(folder, "oasst")
    assert [name for name in vocabulary.files if name.endswith(".jinja")] == ["chat_template.jinja"]
    assert "chat_template" not in json.loads(vocabulary.files["tokenizer_config.json"])
    tokenizer = AutoTokenizer.from_pretrained(write(vocabulary, tmp_path / "export"))
    assert tokenizer.apply_chat_template(USER, tokenize=False, add_generation_prompt=True) == PROMPT


def test_of_two_templates_the_one_that_transformers_uses_is_kept_alone(folder: Path) -> None:
    edit(folder, "tokenizer_config.json", chat_template="inline {{ messages[0].content }}")
    (folder / "chat_template.jinja").write_text("file {{ messages[0].content }}")
    vocabulary = settle(folder)
    assert vocabulary.render(USER) == f"file {QUESTION}"
    assert "chat_template" not in json.loads(vocabulary.files["tokenizer_config.json"])


def test_named_templates_are_kept_and_the_default_one_renders(folder: Path) -> None:
    templates = [
        {"name": "tool_use", "template": "tools"},
        {"name": "default", "template": "{{ messages[0].content }}"},
    ]
    edit(folder, "tokenizer_config.json", chat_template=templates)
    vocabulary = settle(folder)
    assert vocabulary.render(USER) == QUESTION
    assert json.loads(vocabulary.files["tokenizer_config.json"])["chat_template"] == templates


def test_chatml_ends_its_turns_and_the_text_with_the_same_token(folder: Path, tmp_path: Path) -> None:
    vocabulary = settle(folder, "chatml")
    tokenizer = AutoTokenizer.from_pretrained(write(vocabulary, tmp_path / "export"))
    assert tokenizer.eos_token == vocabulary.eos_token == vocabulary.end_of_turn == "<|im_end|>"
    assert tokenizer.eos_token_id == vocabulary.end_of_turn_id == vocabulary.size - 1
    expected = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(USER, tokenize=False, add_generation_prompt=True) == expected
    assert vocabulary.render(USER) == expected


def test_the_end_of_turn_of_the_checkpoints_own_template_is_found(tmp_path: Path) -> None:
    falcon(tmp_path, special=["<|im_start|>", "<|im_end|>"], chat_template=CHATML)
    vocabulary = settle(tmp_path)
    assert (vocabulary.prompt_format, vocabulary.eos_token) == ("own", "<|endoftext|>")
    assert (vocabulary.end_of_turn, vocabulary.end_of_turn_id) == ("<|im_end|>", 2)


def test_special_tokens_of_the_user_are_added_once_and_in_order(folder: Path, tmp_path: Path) -> None:
    vocabulary = settle(folder, "none", special_tokens=["<b>", "<a>", "<a>"])
    tokenizer = AutoTokenizer.from_pretrained(write(vocabulary, tmp_path / "export"))
    assert vocabulary.added == ("<b>", "<a>") and vocabulary.chat_template is None
    assert tokenizer.encode("<a><b>") == [vocabulary.size - 1, vocabulary.size - 2]


def test_a_template_file_of_the_user_is_used(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("{{ '<u>' + messages[0].content + eos_token }}")
    vocabulary = settle(folder, str(tmp_path / "mine.jinja"), special_tokens=["<u>"])
    assert (vocabulary.prompt_format, vocabulary.added) == ("file", ("<u>",))
    assert vocabulary.render(USER) == f"<u>{QUESTION}<|endoftext|>"


@pytest.mark.parametrize("template", ["{% if %}", "{{ messages[0].content", "{{ raise_exception('no') }}"])
def test_a_template_that_does_not_render_is_the_users_or_the_checkpoints_fault(
    template: str, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.jinja").write_text(template)
    assert isinstance(failure(folder, str(tmp_path / "mine.jinja")), UsageError)
    (folder / "chat_template.jinja").write_text(template)
    for prompt_format in ("auto", "none"):
        assert isinstance(failure(folder, prompt_format), CheckpointError)


@pytest.mark.parametrize("prompt_format", ["alpaca", "/nowhere/x.jinja", ""])
def test_an_unknown_prompt_format_is_a_usage_error(prompt_format: str, folder: Path) -> None:
    assert isinstance(failure(folder, prompt_format), UsageError)


@pytest.mark.parametrize("token", ["", " ", "a\nb"])
def test_an_empty_special_token_is_a_usage_error(token: str, folder: Path) -> None:
    assert isinstance(failure(folder, special_tokens=[token]), UsageError)


@pytest.mark.parametrize(
    ("config", "generation_config"),
    [({"eos_token_id": 0}, None), ({"eos_token_id": [7, 0]}, None), ({"eos_token_id": -1}, {"eos_token_id": 0})],
)
def test_eos_comes_from_the_config_where_the_tokenizer_names_none(
    config: dict[str, Any], generation_config: dict[str, Any] | None, folder: Path, tmp_path: Path
) -> None:
    edit(folder, "tokenizer_config.json", eos_token=None)
    if (folder / "special_tokens_map.json").exists():
        (folder / "special_tokens_map.json").write_text("{}")
    vocabulary = settle(folder, config=config, generation_config=generation_config)
    assert AutoTokenizer.from_pretrained(write(vocabulary, tmp_path / "export")).eos_token_id == vocabulary.eos_id == 0


def test_an_ordinary_token_is_never_made_eos_or_pad_because_of_a_config(folder: Path) -> None:
    assert settle(folder, config={"pad_token_id": 5}).pad_id is None
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    edit(folder, "tokenizer.json", added_tokens=[*added, added[0] | {"id": 1, "content": "!", "special": False}])
    assert settle(folder, config={"pad_token_id": 1}).pad_id is None
    assert settle(folder, config={"pad_token_id": 0}).pad_token == "<|endoftext|>"


def test_oasst_without_any_eos_is_refused(folder: Path) -> None:
    edit(folder, "tokenizer_config.json", eos_token=None)
    if (folder / "special_tokens_map.json").exists():
        (folder / "special_tokens_map.json").write_text("{}")
    assert isinstance(failure(folder, "oasst", config={"eos_token_id": 5}), RefusedError)
    assert settle(folder, "none").eos_id is None


def test_a_named_token_that_tokenizer_json_lacks_gets_the_id_that_transformers_gives_it(
    folder: Path, tmp_path: Path
) -> None:
    edit(folder, "tokenizer_config.json", pad_token="[PAD]", bos_token="<s>")
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    (folder / "config.json").write_text('{"model_type": "falcon"}')
    reference = AutoTokenizer.from_pretrained(folder)
    vocabulary = settle(folder, "none")
    assert (vocabulary.bos_id, vocabulary.pad_id) == (reference.bos_token_id, reference.pad_token_id)
    assert vocabulary.size == len(reference) and vocabulary.added == ()
    assert len(AutoTokenizer.from_pretrained(write(vocabulary, tmp_path / "export"))) == len(reference)


@pytest.mark.parametrize("decoder", [False, True])
def test_special_tokens_map_counts_where_it_counts_for_transformers(decoder: bool, tmp_path: Path) -> None:
    falcon(tmp_path, special=["<s>", "</s>"])
    edit(tmp_path, "special_tokens_map.json", eos_token="</s>", bos_token="<s>")
    if decoder:
        added = json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]
        table = {str(token["id"]): {key: token[key] for key in token if key != "id"} for token in added}
        edit(tmp_path, "tokenizer_config.json", added_tokens_decoder=table)
    else:
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        config.pop("added_tokens_decoder", None)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text('{"model_type": "falcon"}')
    reference = AutoTokenizer.from_pretrained(tmp_path)
    vocabulary = settle(tmp_path, "none")
    assert (vocabulary.eos_token, vocabulary.bos_token) == (reference.eos_token, reference.bos_token)
    assert vocabulary.eos_token == ("<|endoftext|>" if decoder else "</s>")


def test_a_token_that_another_one_breaks_up_is_refused(tmp_path: Path) -> None:
    falcon(tmp_path, special=["<|prompter|>", "prompter"])
    added = json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]
    added[1]["normalized"] = True
    edit(tmp_path, "tokenizer.json", added_tokens=added)
    error = failure(tmp_path, "oasst")
    assert isinstance(error, RefusedError) and "<|prompter|>" in error.message


def test_every_file_that_lists_special_tokens_lists_the_new_ones(folder: Path, tmp_path: Path) -> None:
    eos = {"content": "<|endoftext|>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    edit(folder, "tokenizer_config.json", added_tokens_decoder={"0": eos | {"special": True}})
    edit(folder, "special_tokens_map.json", eos_token=eos)
    edit(folder, "added_tokens.json", **{})
    vocabulary = settle(folder)
    files = {name: json.loads(content) for name, content in vocabulary.files.items() if name.endswith(".json")}
    new = {"<|prompter|>": vocabulary.size - 2, "<|assistant|>": vocabulary.size - 1}
    assert files["added_tokens.json"] == new
    assert files["special_tokens_map.json"] == {"eos_token": eos, "additional_special_tokens": list(new)}
    assert files["tokenizer_config.json"]["additional_special_tokens"] == list(new)
    decoder = files["tokenizer_config.json"]["added_tokens_decoder"]
    assert {decoder[str(number)]["content"]: number for number in new.values()} == new
    tokenizer = AutoTokenizer.from_pretrained(write(vocabulary, tmp_path / "export"))
    assert tokenizer.convert_tokens_to_ids(list(new)) == list(new.values())


def test_what_only_transformers_5_reads_is_written_as_both_majors_read_it(folder: Path, tmp_path: Path) -> None:
    edit(folder, "tokenizer_config.json", tokenizer_class="TokenizersBackend", extra_special_tokens=["<|endoftext|>"])
    vocabulary = settle(folder, "none")
    config = json.loads(vocabulary.files["tokenizer_config.json"])
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and "extra_special_tokens" not in config
    assert config["additional_special_tokens"] == ["<|endoftext|>"]
    AutoTokenizer.from_pretrained(write(vocabulary, tmp_path / "export"))


def test_a_class_that_both_majors_know_is_kept(tmp_path: Path) -> None:
    (source := tmp_path / "checkpoint").mkdir()
    gpt2(source)
    config = json.loads((source / "tokenizer_config.json").read_text())
    vocabulary = settle(source, config=GPT2_CONFIG)
    assert json.loads(vocabulary.files["tokenizer_config.json"])["tokenizer_class"] == config["tokenizer_class"]
    tokenizer = AutoTokenizer.from_pretrained(write(vocabulary, tmp_path / "export", GPT2_CONFIG))
    assert tokenizer.encode("<|prompter|>") == [vocabulary.size - 2]


def test_paths_and_the_names_of_other_files_do_not_reach_the_export(folder: Path) -> None:
    (folder / ".env").write_text("HF_TOKEN=secret")
    edit(
        folder,
        "tokenizer_config.json",
        vocab_file=".env",
        merges_file="../x",
        tokenizer_file="/etc/passwd",
        name_or_path="out/run",
        cache="/home/me/cache",
        special_tokens_map_file=None,
    )
    vocabulary = settle(folder)
    config = json.loads(vocabulary.files["tokenizer_config.json"])
    assert not {"vocab_file", "merges_file", "tokenizer_file", "name_or_path", "cache"} & config.keys()
    assert not any(b"secret" in content for content in vocabulary.files.values())


def test_a_custom_code_tokenizer_is_edited_and_not_imported(folder: Path) -> None:
    (folder / "tokenization_mine.py").write_text(f"open({str(folder / 'canary')!r}, 'w')")
    edit(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["other/repo--tokenization_mine.Mine", None]})
    vocabulary = settle(folder)
    assert json.loads(vocabulary.files["tokenizer_config.json"])["auto_map"] == {
        "AutoTokenizer": ["tokenization_mine.Mine", None]
    }
    assert not (folder / "canary").exists()


def test_slow_files_of_custom_code_are_refused_even_where_they_would_convert(tmp_path: Path) -> None:
    byte_level(["<|endoftext|>"]).model.save(str(tmp_path))
    edit(tmp_path, "tokenizer_config.json", tokenizer_class="GPT2Tokenizer", eos_token="<|endoftext|>")
    assert settle(tmp_path, config=GPT2_CONFIG).prompt_format == "oasst"
    edit(tmp_path, "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_mine.Mine", None]})
    assert isinstance(failure(tmp_path, config=GPT2_CONFIG), RefusedError)


def test_a_vocabulary_file_that_cannot_take_new_tokens_is_left_out(folder: Path) -> None:
    (folder / "tekken.json").write_text("{}")
    assert "tekken.json" in settle(folder, "none").files
    assert "tekken.json" not in settle(folder, "oasst").files


def test_tokenizer_json_is_made_from_byte_level_vocabulary_and_merges(tmp_path: Path) -> None:
    (source := tmp_path / "checkpoint").mkdir()
    truth = byte_level(["<|endoftext|>"])
    truth.model.save(str(source))
    edit(source, "tokenizer_config.json", tokenizer_class="GPT2Tokenizer", eos_token="<|endoftext|>")
    vocabulary = settle(source, config=GPT2_CONFIG)
    exported = AutoTokenizer.from_pretrained(write(vocabulary, tmp_path / "export", GPT2_CONFIG))
    assert exported(TEXTS).input_ids == [encoding.ids for encoding in truth.encode_batch(TEXTS)]
    assert exported.encode("<|assistant|>") == [truth.get_vocab_size() + 1] == [vocabulary.size - 1]


def test_tokenizer_json_is_made_from_a_wordpiece_vocabulary(tmp_path: Path) -> None:
    (source := tmp_path / "checkpoint").mkdir()
    wordpiece(tmp_path)
    truth = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    truth.model.save(str(source))
    edit(source, "tokenizer_config.json", tokenizer_class="BertTokenizer", eos_token="[SEP]")
    config = {"model_type": "bert"}
    exported = AutoTokenizer.from_pretrained(write(settle(source, config=config), tmp_path / "export", config))
    ids = exported(TEXTS, add_special_tokens=False).input_ids
    assert ids == [encoding.ids for encoding in truth.encode_batch(TEXTS)]
    assert exported.encode("<|assistant|>", add_special_tokens=False) == [len(exported) - 1]


@pytest.mark.parametrize("class_name", ["NoSuchTokenizer", "BertTokenizer", "LlamaTokenizer", "../GPT2Tokenizer", 3])
def test_slow_files_of_another_class_are_refused(class_name: object, tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}')
    edit(tmp_path, "tokenizer_config.json", tokenizer_class=class_name)
    assert isinstance(failure(tmp_path, "none"), RefusedError)


def test_a_default_vocabulary_in_the_place_of_the_files_own_is_refused(tmp_path: Path) -> None:
    (tmp_path / "qwen.tiktoken").write_text("YQ== 0\nYg== 1\n")
    edit(tmp_path, "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    assert isinstance(failure(tmp_path, "none", config={"vocab_size": 300}), RefusedError)


@pytest.mark.skipif(find_spec("sentencepiece") is not None, reason="sentencepiece is installed")
def test_a_sentencepiece_model_without_its_library_names_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\x00no model")
    error = failure(tmp_path)
    assert isinstance(error, RefusedError) and "pip install sentencepiece" in error.hint


def test_a_folder_without_a_tokenizer_says_what_to_copy(tmp_path: Path) -> None:
    error = failure(tmp_path)
    assert isinstance(error, CheckpointError) and "beside config.json" in error.hint


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"a":' * 100_000])
def test_a_file_that_is_not_json_is_named(name: str, content: bytes, folder: Path) -> None:
    (folder / name).write_bytes(content)
    error = failure(folder)
    assert isinstance(error, CheckpointError) and name in error.message


PANICKING = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"], "continuing_subword_prefix": "prefix"}


@pytest.mark.parametrize("keys", [{"added_tokens": 3}, {"model": None}, {"model": PANICKING}, {"decoder": 1}])
def test_json_that_is_no_tokenizer_is_a_damaged_checkpoint(keys: dict[str, Any], folder: Path) -> None:
    edit(folder, "tokenizer.json", **keys)
    error = failure(folder)
    assert isinstance(error, CheckpointError) and "tokenizer.json" in error.message


def test_a_token_that_the_library_would_give_another_tokens_id_is_refused(folder: Path) -> None:
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    last = max(model["vocab"], key=lambda token: model["vocab"][token])
    model["vocab"][last] += 1
    edit(folder, "tokenizer.json", model=model)
    assert isinstance(failure(folder), RefusedError)


@pytest.mark.parametrize(
    "keys",
    [
        {"eos_token": 5},
        {"eos_token": {"content": []}},
        {"additional_special_tokens": "<a>"},
        {"additional_special_tokens": [3]},
        {"added_tokens_decoder": []},
        {"added_tokens_decoder": {"x": {"content": "a"}}},
        {"added_tokens_decoder": {"1": "a"}},
        {"chat_template": 3},
        {"chat_template": [{"name": "default"}]},
        {"chat_template": {"default": "x"}},
        {"pad_token": "\ud800"},
    ],
)
def test_a_config_of_the_wrong_form_is_a_damaged_checkpoint(keys: dict[str, Any], folder: Path) -> None:
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text()) | keys
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert isinstance(failure(folder), CheckpointError)


def test_a_link_that_leaves_the_folder_is_refused_and_the_hub_caches_are_read(folder: Path, tmp_path: Path) -> None:
    expected = settle(folder).files
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    folder.rename(blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(os.path.relpath(path, snapshot))
    assert settle(snapshot).files == expected
    (tmp_path / "secret").write_text("{{ messages[0].content }}")
    (snapshot / "chat_template.jinja").symlink_to(tmp_path / "secret")
    assert isinstance(failure(snapshot), CheckpointError)


def test_a_device_in_the_place_of_a_file_is_refused(folder: Path) -> None:
    (folder / "vocab.json").unlink(missing_ok=True)
    os.mkfifo(folder / "vocab.json")
    assert isinstance(failure(folder), CheckpointError)


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 10 ** (10 ** 9) }}",
        "{{ ('a' * 700_000_000) | length }}",
        "{% set x = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set x.s = x.s + x.s %}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ 'a' * 2 ** 21 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch canary') }}",
        "{% include 'canary' %}",
    ],
)
def test_a_hostile_template_neither_runs_nor_hangs(
    template: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (folder / "chat_template.jinja").write_text(template)
    start = time.monotonic()
    assert isinstance(failure(folder), CheckpointError)
    assert time.monotonic() - start < 30 and not (tmp_path / "canary").exists()


def test_rows_are_never_taken_away_and_grow_to_a_multiple_of_16() -> None:
    assert [embedding_rows(64, size) for size in (1, 64, 65, 80, 81)] == [64, 64, 80, 80, 96]
    assert embedding_rows(65, 65) == 65
