"""An exported folder on its way to a Hub: the real one, or one on this machine to rehearse with."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from exporter.console import Console
from exporter.facts import prompt_of
from exporter.hub import Destination, OutgoingFile, Publication, Push, connect, download
from exporter.options import Options
from exporter.preparation import Prepared
from exporter.report import Report
from exporter.shards import WrittenFile
from exporter.verify import Check, check_file, check_loads


def finish_push(
    push: Push, folder: Path, files: Sequence[WrittenFile], report: Report, console: Console
) -> Publication:
    """Make exactly ``files`` visible in one commit; those that did not go ahead are sent first."""
    total = sum(file.size for file in files)
    with report.timed("publish"), console.progress("Publishing", total) as progress:
        publication = push.commit([outgoing(file, folder) for file in files], progress)
    report.status = publication.status
    report.hub = asdict(publication)
    del report.hub["status"]
    return publication


def outgoing(file: WrittenFile, folder: Path) -> OutgoingFile:
    return OutgoingFile(file.path, folder / file.path, file.size, file.sha256)


def rehearse(
    destination: Destination,
    folder: Path,
    files: Sequence[WrittenFile],
    prepared: Prepared,
    options: Options,
    report: Report,
    console: Console,
) -> None:
    """The whole publish against a throw-away Hub on this machine, downloaded again into a clean folder and loaded."""
    import tempfile

    from exporter.rehearsal import RehearsalHub

    _without_proxy()
    with (
        RehearsalHub(organizations=[destination.namespace]) as hub,
        tempfile.TemporaryDirectory(prefix="rehearsal-") as cache,
    ):
        card = prepared.texts["README.md"].decode()
        connection = connect(destination, token=hub.token, endpoint=hub.endpoint, card=card, note=console.note)
        publication = finish_push(Push(connection, note=console.note), folder, files, report, console)
        with report.timed("read_back"):
            copy = download(
                destination.repo_id, publication.commit, endpoint=hub.endpoint, token=hub.token, cache=Path(cache)
            )
            for file in files:
                check_file(file, copy)
            prompt = prompt_of(prepared.vocabulary)
            loaded = check_loads(copy, prompt, options.trust_remote_code, options.cache_dir)
        report.checks.append(Check("rehearsal", "passed", f"{len(files)} files read back; {loaded.detail}"))
    report.status = "rehearsed"


def _without_proxy() -> None:
    """The rehearsal Hub is on this machine: a proxy could not reach it."""
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1", "localhost"]))
