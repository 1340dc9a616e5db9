"""Publishing a folder that was exported earlier: exactly its files, after they were checked against its manifest."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from exporter.checkpoints.folder import read_json, regular_size
from exporter.console import Console
from exporter.credentials import require_no_credentials
from exporter.errors import UsageError
from exporter.hub import Push, connect, known_tokens
from exporter.manifest import MANIFEST_NAME, read_manifest_files
from exporter.options import ReleaseOptions
from exporter.proof import check_files
from exporter.publisher import finish_push
from exporter.report import Report
from exporter.shards import WrittenFile


@dataclass(frozen=True)
class PublishOptions(ReleaseOptions):
    """The folder, and where and how to commit it; ``hf_repo_name`` None means the name in its manifest."""

    folder: Path


def run_publish(options: PublishOptions, report: Report, console: Console) -> None:
    """Publish ``options.folder`` as it stands.

    Raises:
        UsageError: the folder was exported for another repository, or for none.
        VerificationError: it no longer equals its manifest.
        RefusedError: a text file, or the message of the commit, holds a credential.
        CheckpointError: a file is a link that leaves the folder.
        CredentialError, HubRefusedError, HubUnreachableError: as the Hub answers.
    """
    if not os.path.isdir(options.folder):
        raise UsageError(f"There is no folder {options.folder.name!r}.", "Name a folder that this program exported.")
    with report.timed("files"):
        report.checks.append(check_files(options.folder, console))
    destination = options.destination(_repository(options))
    manifest = (options.folder / MANIFEST_NAME).read_bytes()
    own = WrittenFile(MANIFEST_NAME, len(manifest), hashlib.sha256(manifest).hexdigest())
    files = [*read_manifest_files(options.folder), own]
    texts = _texts(options, files)
    require_no_credentials(texts, known_tokens(options.auth_token))
    card = texts["README.md"].decode() if "README.md" in texts else None
    with report.timed("connect"):
        connection = connect(destination, token=options.auth_token, card=card, note=console.note)
    finish_push(Push(connection, note=console.note), options.folder, files, report, console)


def _texts(options: PublishOptions, files: Sequence[WrittenFile]) -> dict[str, bytes]:
    """What is published but the weights."""
    given = {"--commit_message": options.commit_message.encode()} if options.commit_message else {}
    for file in files:
        regular_size(options.folder / file.path)
        if not file.path.endswith(".safetensors"):
            given[file.path] = (options.folder / file.path).read_bytes()
    return given


def _repository(options: PublishOptions) -> str:
    """The repository that the folder was exported for, which its card names."""
    made = read_json(options.folder / MANIFEST_NAME).get("options")
    name = made.get("hf_repo_name") if isinstance(made, dict) else None
    wanted = options.hf_repo_name or name
    if name is None or wanted != name:
        raise UsageError(
            f"The folder was exported for {name or 'no repository'}, and its card says so; it cannot be {wanted}.",
            f"Export again with --hf_repo_name {wanted or 'NS/NAME'} --no_publish --output_folder DIR.",
        )
    return str(name)
