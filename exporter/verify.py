"""Whether what was written is right: its files, its tensors against the source, and whether it loads.

The files are opened with the safetensors library and the source is read again; nothing that the writer kept in memory
is trusted.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.architecture import quiet_library
from exporter.checkpoints.adapter import CONFIG as ADAPTER_CONFIG
from exporter.checkpoints.adapter import WEIGHTS as ADAPTER_WEIGHTS
from exporter.checkpoints.adapter import is_adapter
from exporter.checkpoints.folder import read_json
from exporter.checkpoints.pretrained import is_pretrained
from exporter.errors import CheckpointError, ExportError, RefusedError, VerificationError
from exporter.hub import ModelId, find_in_cache
from exporter.plan import PlannedTensor, Shard
from exporter.processor import PROCESSOR_FILES
from exporter.shards import DISK_HINT, Batch, Portion, Progress, WrittenFile, batches, cast_blocks, uncounted
from exporter.tensors import BLOCK_BYTES, LazyTensor, SourceFiles, are_equal, is_same, same_bits

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Check:
    """One finding for the report: passed, failed or unavailable, and what was compared."""

    name: str
    status: str
    detail: str


def check_file(file: WrittenFile, folder: Path, progress: Progress = uncounted) -> None:
    """The file on the disk has the size and sha256 that were recorded.

    Raises:
        VerificationError: it has not.
    """
    path = folder / file.path
    digest = hashlib.sha256()
    if path.exists() and not path.is_file():
        raise VerificationError(f"{file.path} is not a file.", DISK_HINT)
    try:
        with path.open("rb") as opened:
            while block := opened.read(BLOCK_BYTES):
                digest.update(block)
                progress(len(block))
            size = opened.tell()
    except OSError as error:
        raise VerificationError(f"{file.path} cannot be read: {error.strerror}.", DISK_HINT) from error
    if (size, digest.hexdigest()) != (file.size, file.sha256):
        raise VerificationError(
            f"{file.path} has {size} bytes and sha256 {digest.hexdigest()[:12]}…, "
            f"expected {file.size} and {file.sha256[:12]}….",
            DISK_HINT,
        )


def check_shard(shard: Shard, folder: Path, workers: Executor, progress: Progress) -> None:
    """Every tensor of the written shard equals its source, bit for bit after the cast; ``workers`` compare batches.

    Raises:
        VerificationError: a tensor is missing, left over, of another dtype or shape, or has another value.
    """
    check_names(shard, folder)
    list(workers.map(lambda batch: check_batch(shard, batch, folder, progress), batches(shard)))


def check_names(shard: Shard, folder: Path) -> None:
    """The file holds the tensors of the plan and no others, each of its dtype and shape.

    Raises:
        VerificationError: it does not.
    """
    with _opened(shard, folder) as written:
        for name in sorted({tensor.name for tensor in shard.tensors} ^ set(written.keys())):
            raise VerificationError(f"{shard.name}: tensor {name} is not in both plan and file.", DISK_HINT)
        for tensor in shard.tensors:
            found = written.get_tensor(tensor.name)
            if tuple(found.shape) != tensor.shape or found.dtype is not tensor.dtype.torch:
                raise VerificationError(
                    f"{shard.name}: {tensor.name} is {found.dtype} {tuple(found.shape)}, "
                    f"expected {tensor.dtype.torch} {tensor.shape}.",
                    DISK_HINT,
                )


def check_batch(shard: Shard, batch: Batch, folder: Path, progress: Progress) -> None:
    """The batch of the written shard equals its source, bit for bit after the cast.

    Raises:
        VerificationError: it does not.
    """
    with _opened(shard, folder) as written, SourceFiles(checksums=False) as files:
        for portion in batch.portions:
            found = written.get_tensor(portion.tensor.name).reshape(-1)
            _check_portion(shard.name, portion, found, files)
            progress(portion.tensor.nbytes)


@contextlib.contextmanager
def _opened(shard: Shard, folder: Path) -> Iterator[Any]:
    """The written shard, as the safetensors library reads it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / shard.name, framework="pt") as written:
            yield written
    except SafetensorError as error:
        raise VerificationError(f"{shard.name} is not a valid safetensors file: {error}.", DISK_HINT) from error
    except FileNotFoundError as error:
        raise VerificationError(f"{shard.name} is not in the folder.", DISK_HINT) from error


def _check_portion(file: str, portion: Portion, found: torch.Tensor, files: SourceFiles) -> None:
    tensor, position = portion.tensor, portion.start
    for _, expected in cast_blocks(tensor, files):
        if not are_equal(found[position : position + expected.numel()], expected):
            raise VerificationError(
                f"{file}: {tensor.name} differs from the checkpoint after element {position}.", DISK_HINT
            )
        position += expected.numel()
    if position != portion.start + tensor.source.numel:
        raise VerificationError(f"{file}: {tensor.name} has {position} elements in the checkpoint.", DISK_HINT)


def check_copy(tensor: PlannedTensor, copy: LazyTensor, progress: Progress) -> None:
    """The checkpoint's master weights, cast, are the model's own copy bit for bit.

    So it is in every healthy checkpoint (DeepSpeed ZeRO-1, 2, and 3 where weights were gathered); a rank's file mixed
    up, or of another step, shows here.

    Raises:
        CheckpointError: they differ.
    """
    cast = PlannedTensor(tensor.name, copy.dtype, tensor.source)
    with SourceFiles() as mine, SourceFiles() as theirs:
        blocks = (written for _, written in cast_blocks(cast, mine))
        same = tensor.shape == copy.shape and same_bits(blocks, _counted(copy.blocks(theirs), progress))
    if not same:
        raise CheckpointError(
            f"{tensor.name} in the optimizer's master weights is not what the model's own copy says.",
            "A file is another rank's or of another save: copy all files of one save, or remove a left-over copy.",
        )


def _counted(blocks: Iterator[torch.Tensor], progress: Progress) -> Iterator[torch.Tensor]:
    for block in blocks:
        progress(block.nbytes)
        yield block


def require_equal(tied_values: Mapping[str, tuple[LazyTensor, str]], weights: Mapping[str, LazyTensor]) -> None:
    """Names that the config calls tied have one value.

    Raises:
        RefusedError: they have not; storing one of them would lose the other.
    """
    for alias, (tensor, target) in tied_values.items():
        if not is_same(tensor, weights[target]):
            raise RefusedError(
                f"{alias} and {target} are tied by config.json but have different values.",
                "Set tie_word_embeddings to false in config.json if the model was trained untied.",
            )


def check_loads(folder: Path, prompt: str, trust_remote_code: bool, cache: Path | None = None) -> Check:
    """The folder loads with transformers, offline, with every weight in its place, and generates from ``prompt``.

    An adapter is loaded with PEFT onto its base model from the Hub client's ``cache`` (None: its own); the check is
    unavailable where either is not there.

    Raises:
        VerificationError: it does not load, or a weight is missing, left over or of another shape.
    """
    try:
        with quiet_library(), contextlib.redirect_stdout(sys.stderr):
            if is_adapter(folder):
                return _check_adapter_loads(folder, prompt, trust_remote_code, cache)
            return Check("load", "passed", _load_and_run(folder, prompt, trust_remote_code))
    except ExportError:
        raise
    except Exception as error:  # whatever the library, PEFT or custom code makes of the files
        reason = " ".join(str(error).split())[:300]
        raise VerificationError(f"transformers cannot load the export: {reason}", DISK_HINT) from error


def _load_and_run(folder: Path, prompt: str, trust_remote_code: bool) -> str:
    import transformers

    local: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **local)
    config = transformers.AutoConfig.from_pretrained(folder, **local)
    model, info = _model_class(config, trust_remote_code).from_pretrained(
        folder, dtype="auto", output_loading_info=True, **local
    )
    faults = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if faults:
        raise VerificationError(f"transformers loads the export with {faults}.", DISK_HINT)
    done = _generate(model, tokenizer, prompt) if model.can_generate() else _run(model, tokenizer, prompt)
    return f"loads with every weight in its place, and {done}{_load_processor(folder, local)}"


def _check_adapter_loads(folder: Path, prompt: str, trust_remote_code: bool, cache: Path | None) -> Check:
    adapter = read_json(folder / ADAPTER_CONFIG)
    base = ModelId(str(adapter.get("base_model_name_or_path")), adapter.get("revision"))
    cached = find_in_cache(base, cache)
    if importlib.util.find_spec("peft") is None:
        return Check("load", "unavailable", "the adapter was not loaded, since peft is not installed here")
    if cached is None or not is_pretrained(cached):
        return Check("load", "unavailable", f"the adapter was not loaded, since {base} is not in the cache here")
    return Check("load", "passed", _load_adapter_and_run(folder, cached, prompt, trust_remote_code))


def _load_adapter_and_run(folder: Path, base: Path, prompt: str, trust_remote_code: bool) -> str:
    """PEFT passes over what it cannot place with a warning; asked to load once more, it returns those names."""
    import transformers
    from peft import PeftModel

    local: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    has_tokenizer = (folder / "tokenizer.json").exists()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder if has_tokenizer else base, **local)
    config = transformers.AutoConfig.from_pretrained(base, **local)
    model = _model_class(config, trust_remote_code).from_pretrained(base, dtype="auto", **local)
    model.resize_token_embeddings(_rows(model, folder), mean_resizing=False)
    adapted = PeftModel.from_pretrained(model, folder)
    result = adapted.load_adapter(folder, "default")
    if result.missing_keys or result.unexpected_keys:
        raise VerificationError(
            f"PEFT does not place {result.unexpected_keys[:3]} and misses {result.missing_keys[:3]}.", DISK_HINT
        )
    done = _generate(adapted, tokenizer, prompt) if model.can_generate() else _run(adapted, tokenizer, prompt)
    return f"PEFT loads it onto its base with every weight in its place, and {done}"


def _rows(model: Any, folder: Path) -> int:
    """The rows of the embedding that was trained: the adapter's where it was saved whole, else those of its base."""
    from safetensors import safe_open

    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as weights:
        saved = [key for key in weights.keys() if f".{name}." in key and key.endswith(".weight")]  # noqa: SIM118
        shapes = [weights.get_slice(key).get_shape() for key in saved]
    return int(shapes[0][0] if shapes else embedding.weight.shape[0])


def _load_processor(folder: Path, local: Mapping[str, Any]) -> str:
    """What is to be said of the model's processor; nothing where it has none."""
    from transformers import AutoProcessor

    if not any((folder / name).exists() for name in PROCESSOR_FILES):
        return ""
    try:
        AutoProcessor.from_pretrained(folder, **local)
    except ImportError:
        return "; its processor was not loaded, since that takes packages that are not installed here"
    return "; its processor loads"


def _model_class(config: Any, trust_remote_code: bool) -> Any:
    """The class that the config names, or for custom code that may run the Auto class that finds it."""
    import transformers

    name = str((config.architectures or [""])[0])
    own = getattr(config, "auto_map", None) or {}
    auto = next((key for key, entry in own.items() if str(entry).rpartition(".")[2] == name), None)
    if auto and trust_remote_code:
        return getattr(transformers, auto)
    return getattr(transformers, name, transformers.AutoModelForCausalLM)


def _generate(model: Any, tokenizer: Any, prompt: str) -> str:
    ids = _token_ids(tokenizer, prompt)
    generated = model.generate(ids, max_new_tokens=8, do_sample=False)
    given = 1 if model.config.is_encoder_decoder else ids.shape[1]
    return f"generates {generated.shape[1] - given} tokens"


def _run(model: Any, tokenizer: Any, prompt: str) -> str:
    """One forward pass; the text is ended, since encoder-decoders classify what they see at its end."""
    model(_token_ids(tokenizer, prompt + (tokenizer.eos_token or "")))
    return "runs"


def _token_ids(tokenizer: Any, text: str) -> Any:
    """The text as a batch of one, [1, tokens], int64. That is all that custom code is sure to take."""
    return tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
