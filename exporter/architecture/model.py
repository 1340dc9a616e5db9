"""The model that config.json names, on the meta device: of transformers' own class, or of the checkpoint's code."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from exporter.code import localize
from exporter.errors import CheckpointError, ExportError, OutputError, RefusedError

_MOST_LAYERS = 1_000_000
_MOST_PARAMETERS = 200_000
"""Parameter tensors; the largest mixtures of experts have some 70 000 in their files."""

_HINT = "Use the config.json that the model was trained with, and a transformers that knows it."


def build_model(config: Mapping[str, Any], code: Mapping[str, bytes], *, trust_remote_code: bool) -> Any:
    """The model on the meta device; ``code`` are the checkpoint's own Python files by name.

    With ``trust_remote_code`` the checkpoint's own class is imported. Where that does not work with the installed
    transformers, and transformers has a class of the name itself, its class is taken: the code of early Falcon models
    is such a case.

    Raises:
        RefusedError: the class is custom code that may not be imported, or is unknown to this transformers.
        CheckpointError: the class does not accept the config.
    """
    _require_modest(config)
    with quiet_library(), contextlib.redirect_stdout(sys.stderr):
        if trust_remote_code and own_class(config) is not None:
            try:
                return _built(config, code)
            except CheckpointError:
                if not _is_native(config):
                    raise
        return _built(config, None)


@contextmanager
def quiet_library() -> Iterator[None]:
    """Without transformers' progress bars and its remarks on configs that the user did not write."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _require_modest(config: Mapping[str, Any]) -> None:
    """Refuse numbers of layers for which a config class alone would fill the memory."""
    for key, value in config.items():
        if isinstance(value, dict):
            _require_modest(value)
        elif isinstance(value, int) and value > _MOST_LAYERS and re.search("layer|expert", key):
            raise CheckpointError(f"config.json has {key} {value}, expected at most {_MOST_LAYERS}.", _HINT)


def _built(config: Mapping[str, Any], code: Mapping[str, bytes] | None) -> Any:
    """The model, of its own ``code`` if that is given, which is then imported."""
    kind = _kind(config)
    try:
        return _native_model(config) if code is None else _imported_model(config, code)
    except ExportError:
        raise
    except (Exception, SystemExit) as error:  # whatever a model class, or custom code, makes of a config
        raise CheckpointError(
            f"config.json does not describe a model that transformers can build as {kind}: {_one_line(error)}", _HINT
        ) from error


def _native_model(config: Mapping[str, Any]) -> Any:
    _require_native(config)
    plain = {key: value for key, value in config.items() if key != "auto_map"}
    with _folder(plain, {}) as folder:
        parsed = _parsed_config(folder, trust_remote_code=False)
    return _on_meta(_native_class(config, parsed), parsed)


def _imported_model(config: Mapping[str, Any], code: Mapping[str, bytes]) -> Any:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    auto_map = {key: localize(entry) for key, entry in _auto_map(config).items()}
    with _folder({**config, "auto_map": auto_map}, code) as folder:
        parsed = _parsed_config(folder, trust_remote_code=True)
        model_class = get_class_from_dynamic_module(str(own_class(config)), folder, local_files_only=True)
        return _on_meta(model_class, parsed)


@contextmanager
def _folder(config: Mapping[str, Any], code: Mapping[str, bytes]) -> Iterator[Path]:
    """A folder with config.json and the code.

    transformers keeps a copy of the code under the folder's name and a hash of the code: with one name for all
    checkpoints its cache does not grow with every export.
    """
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "checkpoint_code"
        try:
            folder.mkdir()
            for name, content in {**code, "config.json": json.dumps(config).encode()}.items():
                (folder / name).write_bytes(content)
        except OSError as error:
            raise OutputError(
                f"The folder of temporary files cannot be written to: {error.strerror}.", "Make room, or set TMPDIR."
            ) from error
        yield folder


def _parsed_config(folder: Path, *, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)


def _on_meta(model_class: Any, parsed: Any) -> Any:
    """The model in bf16, as from_pretrained builds it: what is fp32 in it is so by the class's own will."""
    import torch

    for part in (parsed, *(getattr(parsed, key, None) for key in parsed.sub_configs)):
        if part is not None:
            part.dtype = torch.bfloat16
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"), _uninitialized(), _limited_parameters():
            return model_class(parsed)
    finally:
        torch.set_default_dtype(default)


def _uninitialized() -> Any:
    """A torch mode that leaves out most of what ``torch.nn.init`` would do to tensors without values."""
    from torch.overrides import TorchFunctionMode

    class Uninitialized(TorchFunctionMode):  # type: ignore[misc]
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            named = kwargs or {}
            if getattr(func, "__module__", None) == "torch.nn.init" and "tensor" in named and named["tensor"].is_meta:
                return named["tensor"]
            return func(*args, **named)

    return Uninitialized()


@contextmanager
def _limited_parameters() -> Iterator[None]:
    from torch.nn.modules.module import register_module_parameter_registration_hook

    count = itertools.count(1)

    def check(*_: object) -> None:
        if next(count) > _MOST_PARAMETERS:
            raise CheckpointError(f"config.json describes a model of over {_MOST_PARAMETERS} weights.", _HINT)

    hook = register_module_parameter_registration_hook(check)
    try:
        yield
    finally:
        hook.remove()


def _architecture_name(config: Mapping[str, Any]) -> str | None:
    """The name of the model class; None where config.json has none."""
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"config.json has architectures {names!r}, expected a list of class names.", _HINT)
    return names[0] if names else None


def _kind(config: Mapping[str, Any]) -> str:
    return _architecture_name(config) or str(config.get("model_type"))


def _auto_map(config: Mapping[str, Any]) -> Mapping[str, Any]:
    auto_map = config.get("auto_map")
    return auto_map if isinstance(auto_map, dict) else {}


def own_class(config: Mapping[str, Any]) -> str | None:
    """``module.Class`` of the checkpoint's own model class: the one that ``architectures`` names, or its causal one."""
    own = {key: localize(entry) for key, entry in _auto_map(config).items() if isinstance(entry, str)}
    name = _architecture_name(config)
    named = (entry for entry in own.values() if entry.rpartition(".")[2] == name)
    return next(named, None) or own.get("AutoModelForCausalLM")


def _is_native(config: Mapping[str, Any]) -> bool:
    """Whether transformers itself has the model type and the class that ``config`` names."""
    import transformers

    name = _architecture_name(config)
    return config.get("model_type") in transformers.CONFIG_MAPPING and (name is None or hasattr(transformers, name))


def _require_native(config: Mapping[str, Any]) -> None:
    import transformers

    if _is_native(config):
        return
    if _auto_map(config):
        raise RefusedError(
            f"{_kind(config)} is the checkpoint's own code, which may not be imported.",
            "Read its *.py files; if you trust them, add --trust_remote_code.",
        )
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError("config.json names no model_type.", _HINT)
    raise RefusedError(
        f"config.json names the model type {config['model_type']!r} and the architecture {_kind(config)!r}, which "
        f"transformers {transformers.__version__} does not know.",
        "Install a transformers that has it.",
    )


def _native_class(config: Mapping[str, Any], parsed: Any) -> Any:
    import transformers

    name, causal = _architecture_name(config), transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if name is None and type(parsed) not in causal:
        raise RefusedError(
            f"config.json names no architecture, and {config['model_type']!r} has no causal language model.",
            "Add the name of the model's class to config.json, as architectures.",
        )
    found = causal[type(parsed)] if name is None else getattr(transformers, name)
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise RefusedError(f"config.json names the architecture {name!r}, which is not a model class.", _HINT)
    return found


def _one_line(error: BaseException) -> str:
    """The error in one line, cut to a readable length, without addresses and folders of this machine."""
    text = re.sub(r"https?://[^\s'\"]*|(?<!\w)/(?:[^\s/'\":]+/)+", "", " ".join(str(error).split()))
    return text if len(text) <= 300 else text[:300] + "…"
