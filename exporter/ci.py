"""What a GitHub Actions job learns of a run: step outputs, and a summary on the job's page.

The formats are those of GitHub's workflow commands: GITHUB_OUTPUT takes ``name<<DELIMITER``, the value and DELIMITER in
lines of their own; GITHUB_STEP_SUMMARY takes Markdown, at most 1 MiB for a step.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from exporter.errors import OutputError
from exporter.report import planned_actions

OUTPUTS = ("status", "exit_code", "url", "commit", "tag", "pr_url")
MAX_FILES = 200
"""The most files that a summary lists: a step's summary has a limit, and a reader too."""

_COUNTED = ("added", "replaced", "undecided", "deleted", "unchanged", "kept")


def tell_job(report: Mapping[str, Any], exit_code: int) -> None:
    """Append outputs and summary of a run, whose ``report`` is as the contract has it, where the job wants them.

    Raises:
        OutputError: GITHUB_OUTPUT or GITHUB_STEP_SUMMARY names a file that cannot be written.
    """
    _append("GITHUB_OUTPUT", "".join(_output(name, value) for name, value in _outputs(report, exit_code).items()))
    _append("GITHUB_STEP_SUMMARY", "\n".join(_summary(report)) + "\n")


def _append(variable: str, text: str) -> None:
    path = os.environ.get(variable)
    if not path:
        return
    try:
        with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError as error:
        raise OutputError(
            f"The file that {variable} names cannot be written: {error.strerror}.", f"Unset {variable}, or correct it."
        ) from error


def _outputs(report: Mapping[str, Any], exit_code: int) -> dict[str, str]:
    values = {**(report["hub"] or {}), "status": report["status"], "exit_code": exit_code}
    return {name: str(values[name]) if values.get(name) is not None else "" for name in OUTPUTS}


def _output(name: str, value: str) -> str:
    """One output. The delimiter is random: no value can end its own text early and set another output."""
    delimiter = f"end-{secrets.token_hex(16)}"
    return f"{name}<<{delimiter}\n{value}\n{delimiter}\n"


def _summary(report: Mapping[str, Any]) -> Iterator[str]:
    output, hub, error = report["output"], report["hub"], report["error"]
    yield f"### Export: {report['status']}"
    yield ""
    if error:
        yield from (f"**{_text(error['message'])}** (exit code {error['code']})", "", _text(error["hint"]), "")
    if hub:
        where = "planned" if report["status"] == "planned" else "published"
        yield from _table([where, "revision", "commit", "tag"], [_release(hub)])
        yield from _table(["files", "number"], [[key, len(hub[key])] for key in _COUNTED if key in hub])
        yield from _limited(["plan", "file"], planned_actions(hub))
    if output.get("files"):
        yield f"{output['shards']} weight file(s), {output['total_size']:,} bytes of {output['dtype']}"
        yield ""
    yield from _table(["check", "status", "detail"], [check.values() for check in report["checks"]])
    yield from _limited(["file", "bytes", "sha256"], [file.values() for file in output.get("files") or []])


def _limited(header: Sequence[str], rows: Sequence[Iterable[Any]]) -> Iterator[str]:
    """A table with a row for each file, of many files the first ones."""
    yield from _table(header, rows[:MAX_FILES])
    if len(rows) > MAX_FILES:
        yield from (f"and {len(rows) - MAX_FILES} more files", "")


def _release(hub: Mapping[str, Any]) -> list[Any]:
    return [hub["pr_url"] or hub["url"], hub["revision"], hub["commit"], hub["tag"]]


def _table(header: Sequence[str], rows: Iterable[Iterable[Any]]) -> Iterator[str]:
    """A Markdown table with a blank line after it; nothing without rows."""
    lines = [_row(row) for row in rows]
    if lines:
        yield from (_row(header), _row("---" for _ in header), *lines, "")


def _row(cells: Iterable[Any]) -> str:
    return "| " + " | ".join("" if cell is None else _text(str(cell)) for cell in cells) + " |"


def _text(value: str) -> str:
    """``value`` as one line of Markdown that is no link text, no border of a table and no tag."""
    line = " ".join(value.split()).replace("\\", "\\\\")
    for mark in "|`*<[":
        line = line.replace(mark, f"\\{mark}")
    return line
