"""The checkpoint's own code: the modules that its auto_maps name, and what they import, as files of the export.

Modules are read as text and parsed; nothing is imported. transformers loads a class from a module that lies flat beside
config.json, or in another repository (``other/repo--module.Class``), with what the module imports from beside itself
(transformers 5.24, dynamic_module_utils). Modules of another repository become files beside config.json too.
"""

from __future__ import annotations

import ast
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from exporter.checkpoints.folder import read_json, regular_size
from exporter.errors import CheckpointError, RefusedError

Elsewhere = Callable[[str, str], bytes]
"""Gives the content of a file in another repository: called with NAMESPACE/NAME and the file's name."""

AUTO_MAP_FILES = (
    "config.json",
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
MAX_MODULE_BYTES = 1024 * 1024
"""The largest module that is parsed: three times the largest in transformers, and at most a thousandfold in memory."""

MAX_MODULE_BRACES = 10_000
"""The most fields that its f-strings may have: before Python 3.12 each of them is looked for in the whole string."""

_REPOSITORY = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", re.ASCII)
_COPY = "Copy the module beside config.json, with the modules that it imports."


@dataclass(frozen=True)
class Module:
    """A module that is needed: ``repository`` None means beside config.json, ``reason`` completes "..., but"."""

    name: str
    repository: str | None
    reason: str

    @property
    def file(self) -> str:
        return f"{self.name}.py"


def read_code(folder: Path, elsewhere: Elsewhere | None = None) -> dict[str, bytes]:
    """The Python files that the auto_maps in ``folder`` name, and what they import, by name.

    A module that lies beside config.json is taken from there, also where an auto_map names another repository. What
    does not is asked of ``elsewhere``; None means that nothing may be taken from elsewhere.

    Raises:
        CheckpointError: an auto_map or a module is not what it should be.
        RefusedError: a module is not there, may not be taken from elsewhere, or cannot lie beside the others.
    """
    wanted = list(named_modules(folder))
    seen: set[tuple[str, str | None]] = set()
    files: dict[str, bytes] = {}
    while wanted:
        module = wanted.pop()
        if (module.name, module.repository) in seen:
            continue
        seen.add((module.name, module.repository))
        content = _read(folder, module, elsewhere)
        if files.setdefault(module.file, content) != content:
            raise RefusedError(
                f"{module.reason}, but another {module.file} is needed too, and only one can lie beside config.json.",
                "Rename one of the two modules, in auto_map and where it is imported.",
            )
        for name in imports(module.file, content):
            wanted.append(Module(name, module.repository, f"{module.file} imports .{name}"))
    return files


def named_modules(folder: Path) -> Iterator[Module]:
    """The modules that the auto_maps of the configs in ``folder`` name; one that lies there is taken from there.

    Raises:
        CheckpointError: an auto_map is no object.
        RefusedError: an entry is not ``module.Class``, or a part of the model is another repository's code.
    """
    for file in AUTO_MAP_FILES:
        if not (folder / file).exists():
            continue
        document = read_json(folder / file)
        modules = [_named_module(file, entry) for entry in _entries(file, document)]
        for part in _parts(document):
            modules += _part_modules(file, part)
        for module in modules:
            yield replace(module, repository=None) if os.path.exists(folder / module.file) else module


def imports(file: str, content: bytes) -> list[str]:
    """The modules beside it that the Python ``file`` imports.

    Raises:
        CheckpointError: the file is not Python, or too large.
        RefusedError: it imports from above itself or from a sub-package, which a flat folder has not.
    """
    _require_module_size(file, len(content))
    if content.count(b"{") > MAX_MODULE_BRACES:
        raise CheckpointError(f"{file} has too many braces for a module.", "Move its tables into a JSON file.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(content)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"{file} is not valid Python.", "Copy it again from where it was written.") from error
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            if node.level > 1 or "." in (node.module or ""):
                raise RefusedError(
                    f"{file} imports {'.' * node.level}{node.module or ''}, which cannot lie beside config.json.",
                    "Bring the code into modules that lie beside one another.",
                )
            found += [node.module] if node.module else [alias.name for alias in node.names]
    return list(dict.fromkeys(found))


def _require_module_size(file: str, size: int) -> None:
    if size > MAX_MODULE_BYTES:
        raise CheckpointError(
            f"{file} has {size} bytes, too many for a module.", "Cut it into modules, or remove or replace it."
        )


def localize(value: Any) -> Any:
    """``value`` of an auto_map with ``module.Class`` in the place of ``other/repo--module.Class``, at any depth."""
    if isinstance(value, dict):
        return {key: localize(item) for key, item in value.items()}
    if isinstance(value, list):
        return [localize(item) for item in value]
    return value.rpartition("--")[2] if isinstance(value, str) else value


def _entries(file: str, document: Mapping[str, Any]) -> list[str]:
    auto_map = document.get("auto_map") or {}
    if not isinstance(auto_map, dict):
        raise CheckpointError(
            f"{file}: auto_map is {auto_map!r}, and not an object of class names.",
            f"Take the {file} of the model that was trained.",
        )
    values = [entry for value in auto_map.values() for entry in (value if isinstance(value, list) else [value])]
    return [entry for entry in values if isinstance(entry, str)]


def _named_module(file: str, entry: str) -> Module:
    repository, _, reference = entry.rpartition("--")
    name, _, class_name = reference.partition(".")
    if not name.isidentifier() or not class_name.isidentifier() or not _is_repository(repository):
        raise RefusedError(
            f"{file}: auto_map names {entry}, which is neither module.Class nor namespace/name--module.Class.", _COPY
        )
    return Module(name, repository or None, f"{file}: auto_map names {entry}")


def _is_repository(name: str) -> bool:
    return not name or ("--" not in name and _REPOSITORY.fullmatch(name) is not None)


def _parts(document: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The objects inside a config, at any depth, that have an auto_map of their own."""
    for key, value in document.items():
        if key != "auto_map" and isinstance(value, dict):
            if "auto_map" in value:
                yield value
            yield from _parts(value)


def _part_modules(file: str, part: Mapping[str, Any]) -> Iterator[Module]:
    """The code of a part: transformers finds that of a processor's part, not that of a model's, beside config.json."""
    for entry in _entries(file, part):
        if file != "config.json":
            yield _named_module(file, entry)
        elif "--" in entry:
            raise RefusedError(
                f"{file}: a part of the model names {entry}, and a part's code is only found in its own repository.",
                "Bring the part's code beside config.json, and name it in the auto_map of the whole model.",
            )


def _read(folder: Path, module: Module, elsewhere: Elsewhere | None) -> bytes:
    if module.repository is not None:
        return _read_elsewhere(module, module.repository, elsewhere)
    path = folder / module.file
    if not os.path.exists(path):
        raise RefusedError(f"{module.reason}, but {module.file} is not beside config.json.", _COPY)
    _require_module_size(module.file, regular_size(path))
    return path.read_bytes()


def _read_elsewhere(module: Module, repository: str, elsewhere: Elsewhere | None) -> bytes:
    if elsewhere is None:
        raise RefusedError(
            f"{module.reason}, but {module.file} is not beside config.json, and nobody's code is published unseen.",
            f"Read the code of {repository}; if you trust it, add --trust_remote_code.",
        )
    return elsewhere(repository, module.file)
