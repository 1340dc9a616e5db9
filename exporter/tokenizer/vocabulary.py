"""The vocabulary of an export, settled before anything is planned: added tokens change the rows of the embedding."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.errors import CheckpointError, RefusedError, UsageError
from exporter.tokenizer.conversion import convert
from exporter.tokenizer.files import TEKKEN, TOKENIZER, TokenizerFiles, make_portable, read_tokenizer_files
from exporter.tokenizer.template import (
    MAX_CHARACTERS,
    Message,
    TemplateError,
    check_template,
    keep_templates,
    own_templates,
    packaged_template,
    render,
    replace_templates,
)
from exporter.tokenizer.tokens import Tokens, check_tokens


@dataclass(frozen=True)
class Vocabulary:
    """What an export's tokenizer is: its files, its ids and its prompt format.

    ``files`` are the contents of its files by their path in the export. ``size`` is the highest id that it can produce,
    plus one, ``ordinary_size`` that of the tokens that nobody added to it. ``added`` are the tokens that this export
    added. ``prompt_format`` is oasst, chatml, file (a template of the user's), own (the checkpoint's template) or none.
    ``end_of_turn`` is the special token that the template writes after an assistant's reply, where it writes one:
    generation must stop there too. ``special_tokens`` are the named ones (``bos_token``, ``eos_token``, ...) that the
    template may use.
    """

    files: Mapping[str, bytes]
    size: int
    ordinary_size: int
    added: tuple[str, ...]
    prompt_format: str
    bos_token: str | None
    bos_id: int | None
    eos_token: str | None
    eos_id: int | None
    pad_token: str | None
    pad_id: int | None
    end_of_turn: str | None
    end_of_turn_id: int | None
    chat_template: str | None
    special_tokens: Mapping[str, str]

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """``messages`` as ``apply_chat_template(messages, tokenize=False)`` renders them.

        Raises:
            RefusedError: there is no chat template, or it does not render these messages.
        """
        if self.chat_template is None:
            raise RefusedError("The tokenizer has no chat template.", "Choose one with --prompt_format.")
        try:
            return render(self.chat_template, self.special_tokens, messages, add_generation_prompt)
        except TemplateError as error:
            raise RefusedError(
                f"The chat template does not render: {error}.", "Choose another with --prompt_format."
            ) from error


@dataclass(frozen=True)
class _PromptFormat:
    """Special tokens, and the chat template that uses them; ``template`` None keeps the checkpoint's.

    ``eos`` is the format's own end of a turn; where it is None a turn ends with the tokenizer's eos token.
    """

    name: str
    tokens: tuple[str, ...] = ()
    template: str | None = None
    eos: str | None = None


def settle_vocabulary(
    folder: Path,
    *,
    prompt_format: str,
    special_tokens: Sequence[str] = (),
    config: Mapping[str, Any],
    generation_config: Mapping[str, Any] | None,
) -> Vocabulary:
    """The tokenizer in ``folder`` with the prompt format's special tokens and chat template.

    ``prompt_format`` is auto, oasst, chatml, none, or the path of a Jinja chat template. ``config`` and
    ``generation_config`` are the model's: they name eos and pad where the tokenizer does not. Nothing is imported from
    the folder, and only files that a tokenizer is known to have are read.

    Raises:
        UsageError: the template file cannot be read or does not render, or a special token is empty.
        CheckpointError: there is no tokenizer, or it is broken.
        RefusedError: the prompt format needs an eos token that there is not, a token cannot become a single id, or the
            tokenizer cannot be read without running code.
    """
    _check_texts(special_tokens)
    wanted = None if prompt_format == "auto" else _prompt_format(prompt_format)
    files = read_tokenizer_files(folder)
    make_portable(files)
    if TOKENIZER not in files:
        convert(files, config)
    tokens, templates = Tokens(files), own_templates(files)
    wanted = wanted or _automatic_format(tokens, templates)
    kept = wanted.template is None or (bool(templates) and _knows(tokens, wanted))
    added = tuple(token for token in (*wanted.tokens, *special_tokens) if tokens.require(token))
    _settle_named(tokens, wanted.eos if not kept else None, [config, config.get("text_config"), generation_config])
    required = [*wanted.tokens, *special_tokens]
    if wanted.name == "oasst":
        required.append(_required_eos(tokens))
    if kept or wanted.template is None:
        keep_templates(files)
    else:
        replace_templates(files, wanted.template)
    if added:
        files.remove(TEKKEN)  # it would go before tokenizer.json in a reader that knows it, without the new tokens
    return _settled(files, tokens, wanted, required, added)


def embedding_rows(current_rows: int, vocabulary_size: int) -> int:
    """Rows of an embedding for ids below ``vocabulary_size``: as they are if enough, else the next multiple of 16."""
    return current_rows if current_rows >= vocabulary_size else -(-vocabulary_size // 16) * 16


def _settled(
    files: TokenizerFiles, tokens: Tokens, wanted: _PromptFormat, required: Sequence[str], added: tuple[str, ...]
) -> Vocabulary:
    named = tokens.named()
    template = own_templates(files).get("default")
    end_of_turn = tokens.special_prefix(_tail(template, named, wanted).lstrip()) if template else None
    contents = files.export()
    check_tokens(
        contents[TOKENIZER], {token: number for token in required if (number := tokens.number(token)) is not None}
    )
    bos, eos, pad = (named.get(name) for name in ("bos_token", "eos_token", "pad_token"))
    bos_id, eos_id, pad_id, end_of_turn_id = (
        None if token is None else tokens.number(token) for token in (bos, eos, pad, end_of_turn)
    )
    return Vocabulary(
        files=contents,
        size=tokens.size,
        ordinary_size=tokens.ordinary_size,
        added=added,
        prompt_format=wanted.name,
        bos_token=bos,
        bos_id=bos_id,
        eos_token=eos,
        eos_id=eos_id,
        pad_token=pad,
        pad_id=pad_id,
        end_of_turn=end_of_turn,
        end_of_turn_id=end_of_turn_id,
        chat_template=template,
        special_tokens=named,
    )


def _tail(template: str, named: Mapping[str, str], wanted: _PromptFormat) -> str:
    """What the settled template writes after a reply."""
    try:
        return check_template(template, named) or ""
    except TemplateError as error:
        if wanted.name == "file":
            raise UsageError(
                f"The chat template of --prompt_format does not render: {error}.",
                "Repair it; it must take a user's message and is given messages, add_generation_prompt and the named "
                "special tokens.",
            ) from error
        raise CheckpointError(
            f"The checkpoint's chat template does not render: {error}.",
            "Repair it, or choose another template with --prompt_format.",
        ) from error


def _check_texts(special_tokens: Sequence[str]) -> None:
    for token in special_tokens:
        if not token.strip() or not token.isprintable():
            raise UsageError(f"--special_token {token!r} is not a printable text.", "Give the token as it is written.")


def _prompt_format(name: str) -> _PromptFormat:
    match name:
        case "oasst":
            return _PromptFormat("oasst", ("<|prompter|>", "<|assistant|>"), packaged_template("oasst"))
        case "chatml":
            return _PromptFormat("chatml", ("<|im_start|>", "<|im_end|>"), packaged_template("chatml"), "<|im_end|>")
        case "none":
            return _PromptFormat("none")
    return _PromptFormat("file", template=_template_file(Path(name)))


def _template_file(path: Path) -> str:
    hint = "Give auto, oasst, chatml, none, or the path of a Jinja chat template."
    if not os.path.isfile(path):
        raise UsageError(f"--prompt_format {path.name}: there is no such format or file.", hint)
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_CHARACTERS + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompt_format {path.name} cannot be read as UTF-8 text.", hint) from error
    if not text or len(text) > MAX_CHARACTERS:
        raise UsageError(f"--prompt_format {path.name} holds no template of at most {MAX_CHARACTERS} characters.", hint)
    return text


def _automatic_format(tokens: Tokens, templates: Mapping[str, str]) -> _PromptFormat:
    oasst = _prompt_format("oasst")
    return oasst if not templates or _knows(tokens, oasst) else _PromptFormat("own")


def _knows(tokens: Tokens, wanted: _PromptFormat) -> bool:
    return bool(wanted.tokens) and all(tokens.number(token) is not None for token in wanted.tokens)


def _settle_named(tokens: Tokens, eos: str | None, configs: Sequence[Any]) -> None:
    """eos and pad: the tokenizer's, else the special tokens with the ids that ``configs`` name, if there are such."""
    if eos is not None:
        tokens.name("eos_token", eos)
    for name in ("eos_token", "pad_token"):
        if name not in tokens.named():
            token = next(filter(None, map(tokens.special_token, _numbers(configs, f"{name}_id"))), None)
            if token is not None:
                tokens.name(name, token)


def _required_eos(tokens: Tokens) -> str:
    eos = tokens.named().get("eos_token")
    if eos is None:
        raise RefusedError(
            "The tokenizer has no eos token, with which each turn of the oasst prompt format ends.",
            "Set eos_token in tokenizer_config.json, or choose another --prompt_format.",
        )
    tokens.require(eos)
    return eos


def _numbers(configs: Sequence[Any], key: str) -> list[object]:
    values = [config.get(key) for config in configs if isinstance(config, Mapping)]
    return [number for value in values for number in (value if isinstance(value, list) else [value])]
