"""The tokens beside the vocabulary proper: their ids, and every file of the tokenizer that lists them.

The ids are those that the tokenizers library gives: it numbers added tokens in the order of tokenizer.json's
``added_tokens``, whatever ids are written there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from exporter.errors import CheckpointError, RefusedError
from exporter.tokenizer.files import ADDED_TOKENS, CONFIG, SPECIAL_TOKENS, TOKENIZER, TokenizerFiles

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The named special tokens, in the order in which transformers adds those that tokenizer.json lacks."""

_LIST = "additional_special_tokens"
_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


class Tokens:
    """The tokens of a tokenizer, which can be added to; each addition is an edit of the tokenizer's files.

    Raises:
        CheckpointError: tokenizer.json is not a tokenizer, or another file lists its tokens in an unknown form.
        RefusedError: a token gets an id that another one has.
    """

    def __init__(self, files: TokenizerFiles) -> None:
        self.files = files
        self._library = load_library(files.encoded(TOKENIZER))
        self._ids = set(self._library.get_vocab(with_added_tokens=True).values())
        entries = files.get(TOKENIZER, "added_tokens") or []
        self._entries: dict[str, dict[str, Any]] = {entry["content"]: entry for entry in entries}
        for content, flags in self._declared():
            if content and content not in self._entries:
                self._add(content, flags)

    @property
    def size(self) -> int:
        """The highest id plus one."""
        return max(self._ids, default=-1) + 1

    @property
    def ordinary_size(self) -> int:
        """The highest id of a token that is not an added one, plus one."""
        vocabulary = self._library.get_vocab(with_added_tokens=False)
        return max((number for token, number in vocabulary.items() if token not in self._entries), default=-1) + 1

    def number(self, token: str) -> int | None:
        """The id of ``token``, or None where it is none."""
        number: int | None = self._library.token_to_id(token)
        return number

    def special_token(self, number: object) -> str | None:
        """The special token with the id ``number``, or None where it is no special token's."""
        known = (token for token, entry in self._entries.items() if entry.get("special") and entry["id"] == number)
        return next(known, None) if isinstance(number, int) else None

    def special_prefix(self, text: str) -> str | None:
        """The longest special token with which ``text`` starts."""
        found = (token for token, entry in self._entries.items() if entry.get("special") and text.startswith(token))
        return max(found, key=len, default=None)

    def named(self) -> dict[str, str]:
        """The named special tokens, such as ``eos_token``, as transformers reads them: special_tokens_map.json counts
        where tokenizer_config.json has no ``added_tokens_decoder``."""
        values = dict(self.files.documents.get(CONFIG, {}))
        if "added_tokens_decoder" not in values:
            values |= self.files.documents.get(SPECIAL_TOKENS, {})
        return {name: token for name in NAMES if (token := _content(name, values.get(name)))}

    def name(self, name: str, token: str) -> None:
        """Make ``token``, which the tokenizer has, the one of this name, such as ``eos_token``."""
        for file in self._listing_files():
            if _content(name, self.files.get(file, name)) != token:
                self.files.set(file, name, token)

    def require(self, token: str) -> bool:
        """Make ``token`` a single special token, with the id that it has, if any; whether it is a new one."""
        new = self.number(token) is None
        if not (token in self._entries and self._entries[token].get("special")):
            self._add(token, _FLAGS)
        self._list(token)
        return new

    def _add(self, content: str, flags: Mapping[str, bool]) -> None:
        entry = {"id": self._number(content, flags), "content": content, **flags}
        others = [other for other in self._entries.values() if other["content"] != content]
        place = next((i for i, other in enumerate(others) if other["id"] > entry["id"]), len(others))
        entries = [*others[:place], entry, *others[place:]]
        self._entries = {entry["content"]: entry for entry in entries}
        self.files.set(TOKENIZER, "added_tokens", entries)

    def _number(self, content: str, flags: Mapping[str, bool]) -> int:
        from tokenizers import AddedToken

        if (known := self.number(content)) is not None:
            return known
        self._library.add_tokens([AddedToken(content, **flags)])
        number = self.number(content)
        if number is None or number in self._ids:
            raise RefusedError(
                f"{TOKENIZER} has no free id for the token {content!r}: the tokenizers library gives it {number}, "
                "which another token has.",
                "Fill the gaps in the ids of its vocabulary first.",
            )
        self._ids.add(number)
        if ADDED_TOKENS in self.files:
            self.files.set(ADDED_TOKENS, content, number)
        return number

    def _list(self, token: str) -> None:
        """Name a special token wherever the tokenizer's files list them."""
        decoder, entry = self.files.get(CONFIG, "added_tokens_decoder"), self._entries[token]
        if decoder is not None and not decoder.get(str(entry["id"]), {}).get("special"):
            flags = {key: value for key, value in entry.items() if key != "id"}
            self.files.set(CONFIG, "added_tokens_decoder", {**decoder, str(entry["id"]): flags})
        if token in self.named().values():
            return
        for file in self._listing_files():
            listed = self.files.get(file, _LIST) or []
            if token not in _contents(file, listed):
                self.files.set(file, _LIST, [*listed, token])

    def _listing_files(self) -> list[str]:
        return [CONFIG, SPECIAL_TOKENS] if SPECIAL_TOKENS in self.files else [CONFIG]

    def _declared(self) -> Iterator[tuple[str, dict[str, bool]]]:
        """Every token that transformers adds when it loads the tokenizer, in its order."""
        listed = [token for file in (CONFIG, SPECIAL_TOKENS) for token in _contents(file, self.files.get(file, _LIST))]
        special = dict.fromkeys([*self.named().values(), *listed])
        if (decoder := self.files.get(CONFIG, "added_tokens_decoder")) is not None:
            yield from _decoder_entries(decoder)
        else:
            for content in _numbered(self.files.documents.get(ADDED_TOKENS, {})):
                yield content, {**_FLAGS, "normalized": content not in special, "special": content in special}
        yield from ((content, _FLAGS) for content in special)


def load_library(content: bytes) -> Tokenizer:
    """tokenizer.json as the tokenizers library reads it.

    Raises:
        CheckpointError: it does not.
    """
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_buffer(content)
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(
            f"{TOKENIZER} is not a tokenizer: {' '.join(str(error).split())[:200]}.",
            "Copy the tokenizer files of the model that was trained again.",
        ) from error


def check_tokens(content: bytes, numbers: Mapping[str, int]) -> None:
    """Load the edited tokenizer.json again: each token of ``numbers`` is one id, that one, and comes back from it.

    Raises:
        RefusedError: one is not.
    """
    library = load_library(content)
    special = {number for number, token in library.get_added_tokens_decoder().items() if token.special}
    for token, number in numbers.items():
        ids = library.encode(token, add_special_tokens=False).ids
        if ids != [number] or library.id_to_token(number) != token or number not in special:
            raise RefusedError(
                f"The tokenizer does not take {token!r} as one special token: found ids {ids}, expected {[number]}.",
                "Choose another token, or add it with the tokenizers library first.",
            )


def _decoder_entries(decoder: Any) -> Iterator[tuple[str, dict[str, bool]]]:
    try:
        entries = [entry for _, entry in sorted(decoder.items(), key=lambda item: int(item[0]))]
        found = [(str(entry["content"]), {key: bool(entry.get(key)) for key in _FLAGS}) for entry in entries]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{CONFIG} has an added_tokens_decoder that is not a table from ids to tokens.",
            "Copy the tokenizer files of the model that was trained again.",
        ) from error
    yield from found


def _numbered(ids: Mapping[str, Any]) -> list[str]:
    """The tokens of added_tokens.json in the order of their ids."""
    if not all(isinstance(number, int) for number in ids.values()):
        raise CheckpointError(f"{ADDED_TOKENS} is not a table from tokens to ids.", "Repair it.")
    return sorted(ids, key=lambda token: ids[token])


def _contents(file: str, values: Any) -> list[str]:
    if not isinstance(values, list | None):
        raise CheckpointError(f"{file} has {_LIST} that is not a list.", "Repair it.")
    return [token for value in values or [] if (token := _content(_LIST, value))]


def _content(name: str, value: Any) -> str | None:
    """A special token's text: it may be written as such, or as a table with flags."""
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str | None):
        raise CheckpointError(f"{name} of the tokenizer is {type(content).__name__}, expected a text.", "Repair it.")
    return content or None
