"""Paths of one machine, in texts that are read on others: a card, a config, a manifest."""

from __future__ import annotations

import re
from pathlib import PurePosixPath, PureWindowsPath

_NAME = r"[^\s/\\\"'`<>|:;,()\[\]{}]+"
_START = r"(?<![\w/\\.|<>~%$}-])"
_PATH = re.compile(
    rf"""(?P<quote>["'])(?P<quoted>(?:file:/|~|/[^"'\n/{{}}]+|[A-Za-z]:)[\\/][^"'\n{{}}]+)(?P=quote)"""
    rf"|{_START}(?P<windows>[A-Za-z]:[\\/](?:{_NAME}[\\/])*{_NAME}[\\/]?)"
    rf"|{_START}(?P<posix>file://(?:localhost)?/{_NAME}(?:/{_NAME})*/?|~\w*(?:/{_NAME})+/?|(?:/{_NAME}){{2,}}/?)"
)
"""An absolute path of two names or more, in quotes also with spaces; ``~/x``; ``file:///x``; ``C:\\x``.

One name alone, as ``/no_think``, may be a word. In a URL, a Hub id and ``</s>`` something stands before the slash.
"""


def is_local_path(value: object) -> bool:
    """Whether ``value`` is a string that is a path of one machine and nothing else."""
    return isinstance(value, str) and _PATH.fullmatch(f'"{value.strip()}"') is not None


def without_local_paths(text: str) -> str:
    """``text`` with the last name of each such path in its place. Relative paths stay."""
    return _PATH.sub(_last_name, text)


def _last_name(found: re.Match[str]) -> str:
    quote, path = found["quote"] or "", found["quoted"] or found["windows"] or found["posix"]
    name = PureWindowsPath(path).name if path[1:2] == ":" else PurePosixPath(path).name
    return f"{quote}{name}{quote}"
