"""The recipe: from a checkpoint to a published model repository, read top to bottom."""

from __future__ import annotations

import gc
import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from exporter.console import Console
from exporter.credentials import require_no_credentials
from exporter.description import describe_forecast, describe_source
from exporter.errors import UsageError
from exporter.facts import prompt_of
from exporter.hub import Connection, Destination, Push, connect, has_token, known_tokens
from exporter.inputs import Inputs
from exporter.manifest import MANIFEST_NAME, Manifest
from exporter.options import Options, content_options
from exporter.preparation import Prepared, prepare
from exporter.publisher import finish_push, rehearse
from exporter.report import Report, package_versions
from exporter.shards import WrittenFile
from exporter.source import find_model
from exporter.staging import check_output_folder, place_export, private_place, staging_folder
from exporter.tensors import LazyTensor
from exporter.verify import check_loads
from exporter.writer import needed_bytes, write


def run_export(options: Options, report: Report, console: Console) -> None:
    """Export ``options.checkpoint``; ``report`` is filled as the run goes on.

    Raises:
        ExportError: as the stages raise it; nothing half-made is left behind or published.
    """
    destination = options.destination(options.repo_name) if options.repo_name is not None else None
    if options.no_publish and options.output_folder is None and not options.dry_run:
        raise UsageError("--no_publish leaves nothing behind without a folder.", "Add --output_folder.")
    _require_compatible(options)
    is_folder = find_model(options.checkpoint) is None
    if options.output_folder is not None:
        source = options.checkpoint if is_folder else options.access.cache_folder
        check_output_folder(options.output_folder, source, options.overwrite)
        if options.rl_checkpoint is not None:
            check_output_folder(options.output_folder, options.rl_checkpoint, options.overwrite)
    with report.timed("prepare"), _uncollected():
        prepared = prepare(options, report, console)
    if options.output_folder is not None and prepared.checkpoint.base is not None:
        check_output_folder(options.output_folder, prepared.checkpoint.base.folder, options.overwrite)
    inputs = Inputs.of((tensor.source for tensor in prepared.plan.tensors), prepared.checkpoint)
    _require_clean_manifest(prepared, inputs, options, report)
    card = prepared.texts["README.md"].decode()
    connection = None
    if destination is not None and options.publishes:
        connection = _connect(destination, card, options, report, console)
    if options.dry_run:
        report.status = "planned"
        report.hub = describe_forecast(connection, prepared.plan, prepared.texts) if connection is not None else None
        return
    key = _staging_key(prepared, inputs, options)
    with staging_folder(_place(options), key, needed_bytes(prepared, options), inputs.paths) as staging:
        if taken_over := staging.journal.finished_bytes:
            console.note(f"An earlier run was interrupted; the {taken_over:,} bytes that it finished are taken over.")
        push = Push(connection, note=console.note) if connection is not None else None
        files = write(prepared, inputs, staging, push, options, report, console)
        if options.verify == "load":
            with report.timed("load"):
                prompt = prompt_of(prepared.vocabulary)
                trust = options.trust_remote_code
                report.checks.append(check_loads(staging.folder, prompt, trust, options.cache_dir))
        report.status = "exported"
        if options.rehearse and destination is not None:
            rehearse(destination, staging.folder, files, prepared, options, report, console)
        elif push is not None:
            finish_push(push, staging.folder, files, report, console)
        if options.output_folder is not None:
            place_export(staging, options.output_folder, options.overwrite)
            report.output["folder"] = str(options.output_folder)


def _require_compatible(options: Options) -> None:
    if options.rl_checkpoint is not None and options.reward_model:
        raise UsageError(
            "--rl_checkpoint is for a language model, --reward_model for one that scores texts.", "Give one of them."
        )
    if options.keep_adapter and (options.rl_checkpoint or options.reward_model or options.rope_scaling_factor):
        raise UsageError("--keep_adapter exports an adapter as it is.", "Leave the other option out.")
    factor = options.rope_scaling_factor
    if factor is None and options.rope_scaling_type is not None:
        raise UsageError("--rope_scaling_type does nothing without a factor.", "Add --rope_scaling_factor.")
    if factor is not None and not 1.0 <= factor < math.inf:
        raise UsageError(f"--rope_scaling_factor is {factor}, expected a number of at least 1.", "Give it as 2.0.")


def _require_clean_manifest(prepared: Prepared, inputs: Inputs, options: Options, report: Report) -> None:
    """No credential is in what the manifest will say beside digests: names of files, facts and options."""
    files = tuple(WrittenFile(name, len(text), "") for name, text in prepared.texts.items())
    source = describe_source(prepared.checkpoint, prepared.code_commits, inputs, report)
    manifest = Manifest(files, source, content_options(options), versions={}, checks=())
    require_no_credentials({MANIFEST_NAME: manifest.dump()}, known_tokens(options.auth_token))


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without Python's collector, which would go again and again over all that torch and transformers make on import,
    and once more at the end of the process: a second of each run."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _place(options: Options) -> Path:
    """Where the export goes; without an output folder a place of its own for the same checkpoint, options and Hub."""
    from huggingface_hub import constants

    if options.output_folder is not None:
        return options.output_folder
    checkpoint = Path(os.path.realpath(options.checkpoint))
    where = (constants.ENDPOINT, options.revision, options.create_pr, options.rehearse)
    made_from = json.dumps((str(checkpoint), options.tag, where, content_options(options)))
    return private_place(f"{checkpoint.name}-{hashlib.sha256(made_from.encode()).hexdigest()[:16]}")


def _staging_key(prepared: Prepared, inputs: Inputs, options: Options) -> str:
    """What a staged export is an export of: the same digest means the same bytes from the same files."""
    digest = hashlib.sha256(json.dumps([package_versions(), options.verify]).encode())
    for shard in prepared.plan.shards:
        digest.update(shard.name.encode() + shard.header)
    for tensor in prepared.plan.tensors:
        digest.update(_origin(tensor.source, inputs).encode())
    for name, text in sorted(prepared.texts.items()):
        digest.update(name.encode() + hashlib.sha256(text).digest())
    for file in inputs.files.values():
        digest.update(json.dumps(asdict(file)).encode())
    return digest.hexdigest()


def _origin(tensor: LazyTensor, inputs: Inputs) -> str:
    """How the tensor is made from the files, by their names: which parts of them, and with what arithmetic."""
    text = repr(tensor)
    for path in tensor.paths:
        text = text.replace(repr(path), repr(inputs.files[path].name))
    return text


def _connect(
    destination: Destination, card: str, options: Options, report: Report, console: Console
) -> Connection | None:
    """Ask the Hub all that can be known before a weight is read; a dry run does without where there is no token."""
    if options.dry_run and not has_token(options.auth_token):
        console.note("There is no token: the plan is made without asking the Hub.")
        return None
    with report.timed("connect"):
        return connect(destination, token=options.auth_token, card=card, note=console.note)
