"""Which modules PEFT gives factors to when it loads an adapter: those that the settings of its config match.

A factor of any other module is left out by PEFT without an error. Settings: ``check_target_module_exists`` in
``peft/tuners/tuners_utils.py`` of PEFT 0.21.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from exporter.errors import CheckpointError

_ALL_LINEAR = "all-linear"


def require_targets(config: Mapping[str, Any], modules: Iterable[str]) -> None:
    """Each of ``modules``, by its name in memory, is one that the adapter's ``config`` gives factors to.

    Raises:
        CheckpointError: one is not, or a setting is broken.
    """
    for module in modules:
        try:
            found = is_target(config, module)
        except (re.error, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise CheckpointError("adapter_config.json: target_modules is broken.", "Copy it again.") from error
        if not found:
            raise CheckpointError(
                f"The adapter has factors of {module}, which target_modules of its adapter_config.json does not name.",
                "Copy config and weights of one save.",
            )


def is_target(config: Mapping[str, Any], module: str) -> bool:
    """Whether the module of that name in memory gets factors."""
    excluded, targets = config.get("exclude_modules"), config.get("target_modules")
    if excluded and _names(excluded, module):
        return False
    if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in config.get("modules_to_save") or ()):
        return False
    if isinstance(targets, str):
        return targets == _ALL_LINEAR or _names(targets, module)
    return _names(targets or (), module) and _is_in_layers(config, module)


def _names(setting: Any, module: str) -> bool:
    """Whether a setting, an expression or a list of the ends of names, is of ``module``."""
    if isinstance(setting, str):
        return re.fullmatch(setting, module) is not None
    return any(f".{module}".endswith(f".{name}") for name in setting)


def _is_in_layers(config: Mapping[str, Any], module: str) -> bool:
    """Whether the layer of ``module``, by the first number in its name, is one of ``layers_to_transform``."""
    wanted, patterns = config.get("layers_to_transform"), config.get("layers_pattern")
    if wanted is None or wanted == []:
        return True
    patterns = [patterns] if isinstance(patterns, str) else patterns
    starts = [rf"(?:^|.*?\.){pattern}" for pattern in patterns] if patterns else [r".*?\.[^.]*"]
    found = next(filter(None, (re.match(rf"{start}\.(\d+)\.", module) for start in starts)), None)
    return found is not None and int(found[1]) in (wanted if isinstance(wanted, list) else [wanted])
