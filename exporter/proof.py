"""Proving an exported folder again, at any age: against its manifest, against the checkpoint, by loading it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from exporter.checkpoints import WeightsChoice
from exporter.checkpoints.adapter import is_adapter
from exporter.checkpoints.folder import read_json
from exporter.code import read_code
from exporter.config import read_config, read_generation_config
from exporter.console import Console
from exporter.errors import UsageError, VerificationError
from exporter.facts import prompt_of
from exporter.hub import HubAccess, prove_published
from exporter.inspection import describe
from exporter.manifest import MANIFEST_NAME, read_manifest_files
from exporter.options import TARGETS, Options
from exporter.preparation import open_with_config
from exporter.report import Report
from exporter.shards import block_workers
from exporter.source import open_kept_adapter
from exporter.tokenizer import QUESTION, Vocabulary, settle_vocabulary
from exporter.verify import Check, check_file, check_loads, check_shard
from exporter.weights import plan_adapter, plan_weights

_HINT = "Export again; do not use this folder."


@dataclass(frozen=True)
class ProofOptions:
    """What is proven: ``folder`` against its manifest, against ``checkpoint``, and by loading it."""

    folder: Path
    checkpoint: Path | None = None
    tag: str | None = None
    load: bool = False
    trust_remote_code: bool = False
    base_model: str | None = None
    rl_checkpoint: Path | None = None
    access: HubAccess = field(default_factory=HubAccess)


def run_verify(options: ProofOptions, report: Report, console: Console) -> None:
    """Prove the folder; the report's ``checks`` say what was proven.

    Raises:
        VerificationError: a file is not what the manifest says, or a tensor not what the checkpoint says.
        CheckpointError: the checkpoint cannot be read.
    """
    if not os.path.isdir(options.folder):
        raise UsageError(f"There is no folder {options.folder.name!r}.", "Name a folder that this program exported.")
    with report.timed("files"):
        report.checks.append(check_files(options.folder, console))
    if options.checkpoint is not None:
        with report.timed("source"):
            report.checks.append(_check_source(options, options.checkpoint, report, console))
    if options.load:
        with report.timed("load"):
            cache = options.access.cache
            report.checks.append(check_loads(options.folder, _prompt(options.folder), options.trust_remote_code, cache))
    report.status = "verified"


def prove_on_hub(repo_id: str, revision: str, report: Report) -> None:
    """Prove a published revision against the manifest in it, without downloading its weights.

    Raises:
        UsageError: there is no such repository or revision.
        VerificationError: a file there is not what the manifest says.
        HubUnreachableError, CredentialError, HubRefusedError: as the Hub answers.
    """
    with report.timed("hub"):
        proven = prove_published(repo_id, revision)
    report.hub = {
        "endpoint": proven.endpoint,
        "repo_id": repo_id,
        "url": proven.url,
        "commit": proven.commit,
        "revision": revision,
        "pr_url": None,
        "tag": None,
        "transport": None,
        "added": (),
        "deleted": (),
        "unchanged": proven.paths,
        "uploaded_bytes": 0,
    }
    report.checks.append(
        Check("hub", "passed", f"{len(proven.paths)} files and their headers are what {MANIFEST_NAME} says")
    )
    report.status = "verified"


def check_files(folder: Path, console: Console) -> Check:
    """The folder holds the files of its manifest, as they were written, and no others."""
    files = read_manifest_files(folder)
    listed = {file.path for file in files} | {MANIFEST_NAME}
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    for name in sorted(found - listed):
        raise VerificationError(f"{name} is in the folder but not in {MANIFEST_NAME}.", _HINT)
    with ThreadPoolExecutor() as pool, console.progress("Checking files", sum(file.size for file in files)) as progress:
        list(pool.map(lambda file: check_file(file, folder, progress), files))
    return Check("files", "passed", f"{len(files)} files have the size and sha256 of {MANIFEST_NAME}")


def _own_vocabulary(folder: Path) -> Vocabulary:
    """The tokenizer of the export as it stands."""
    return settle_vocabulary(
        folder,
        prompt_format="none",
        config={} if is_adapter(folder) else read_config(folder),
        generation_config=read_generation_config(folder),
    )


def _prompt(folder: Path) -> str:
    """A prompt for the export; an adapter without a tokenizer takes a plain question."""
    if is_adapter(folder) and not (folder / "tokenizer.json").exists():
        return QUESTION
    return prompt_of(_own_vocabulary(folder))


def _check_source(options: ProofOptions, path: Path, report: Report, console: Console) -> Check:
    """Plan the same export again, and compare each of its tensors with the folder's."""
    made = _export_options(options, path)
    if is_adapter(options.folder):
        checkpoint = open_kept_adapter(made.checkpoint, made.tag, made.base_model, options.access, console)
        planned = plan_adapter(made, checkpoint)
    else:
        checkpoint, config = open_with_config(made, options.access, console)
        code, vocabulary = read_code(options.folder), _own_vocabulary(options.folder)
        planned = plan_weights(made, checkpoint, config, code, vocabulary)
    report.checkpoint = describe(checkpoint, planned.weights)
    names = {shard.name for shard in planned.plan.shards}
    found = {entry.name for entry in options.folder.glob("*.safetensors")}
    for name in sorted(names ^ found):
        raise VerificationError(
            f"The weight file {name} is in the folder or in the checkpoint's plan, not in both.", _HINT
        )
    with (
        block_workers(None) as workers,
        console.progress("Comparing weights", planned.plan.total_size) as progress,
    ):
        for shard in planned.plan.shards:
            check_shard(shard, options.folder, workers, progress)
    count = len(planned.plan.tensors)
    return Check("source", "passed", f"{count} tensors equal the checkpoint bit for bit after the cast")


def _recorded(path: Path, source: Mapping[str, Any]) -> Path:
    """``path``; of a model on the Hub the commit that was exported, where no revision is given."""
    is_same = str(path) == source.get("repo_id") and not os.path.exists(path)
    return Path(f"{path}@{source.get('revision')}") if is_same else path


def _export_options(options: ProofOptions, path: Path) -> Options:
    """The options of the export that decide its weights, from the manifest."""
    made = _manifest(options.folder, "options")
    source = _manifest(options.folder, "source")
    try:
        same = Options(
            _recorded(path, source),
            tag=options.tag or source.get("tag"),
            trust_remote_code=options.trust_remote_code,
            base_model=options.base_model or source.get("base_model"),
            rl_checkpoint=options.rl_checkpoint,
            reward_model=bool(made.get("reward_model")),
            dtype=str(made["dtype"]),
            weights=source["weights"],
            max_shard_size=int(made["max_shard_size"]),
        )
        if same.dtype not in TARGETS or same.weights not in get_args(WeightsChoice):
            raise ValueError("it names another dtype or set of weights than this program has")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise VerificationError(f"{MANIFEST_NAME} does not say how the export was made.", "Export again.") from error
    if bool(made.get("rl_checkpoint")) != bool(options.rl_checkpoint):
        how = (
            f"with --rl_checkpoint {made['rl_checkpoint']}" if made.get("rl_checkpoint") else "without --rl_checkpoint"
        )
        raise UsageError(f"{MANIFEST_NAME} says that the export was made {how}.", "Verify it in the same way.")
    return same


def _manifest(folder: Path, key: str) -> dict[str, Any]:
    value = read_json(folder / MANIFEST_NAME).get(key)
    return value if isinstance(value, dict) else {}
