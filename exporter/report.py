"""What one run did, for people and for CI jobs: filled as the run goes on, so that a failure reports what was known."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from exporter import __version__
from exporter.credentials import redact_values
from exporter.errors import OutputError
from exporter.verify import Check

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub")


def package_versions() -> dict[str, str]:
    """The versions of this program and of the packages that its output depends on."""
    versions = {"export-model": __version__}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    return versions


def planned_actions(hub: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What publishing would do to each file, if ``hub`` is that of a plan; nothing of a release that was made."""
    if "sent_bytes" not in hub:
        return []
    replaced = set(hub["replaced"])
    actions = [
        ("add", [path for path in hub["added"] if path not in replaced]),
        ("replace", hub["replaced"]),
        ("send if changed", hub["undecided"]),
        ("delete", hub["deleted"]),
        ("leave", hub["unchanged"]),
        ("keep", hub["kept"]),
    ]
    return [(action, path) for action, paths in actions for path in paths]


@dataclass
class Report:
    """The report's fields, as the contract names them."""

    status: str = "failed"
    error: dict[str, Any] | None = None
    checkpoint: dict[str, Any] = field(default_factory=dict)
    output: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Any] = field(default_factory=dict)
    vocabulary: dict[str, Any] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    hub: dict[str, Any] | None = None
    timings: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the seconds that the ``with`` block takes to ``timings``."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.timings[stage] = round(self.timings.get(stage, 0.0) + time.monotonic() - start, 3)

    def fail(self, code: int, kind: str, message: str, hint: str) -> None:
        """Record how the run ended."""
        self.status = "failed"
        self.error = {"code": code, "kind": kind, "message": message, "hint": hint}

    def redact(self, tokens: Iterable[str]) -> None:
        """Take every credential out of what the checkpoint and the options said, and ``tokens``: what was refused for
        them says so, not them."""
        known = tuple(tokens)
        for name in ("checkpoint", "output", "tensors", "vocabulary", "hub"):
            setattr(self, name, redact_values(getattr(self, name), known))

    def as_dict(self) -> dict[str, Any]:
        return {
            "schema": 1,
            "status": self.status,
            "error": self.error,
            "checkpoint": self.checkpoint,
            "output": self.output,
            "tensors": self.tensors,
            "vocabulary": self.vocabulary,
            "checks": [asdict(check) for check in self.checks],
            "hub": self.hub,
            "timings": self.timings,
            "versions": package_versions(),
        }

    def dump(self) -> str:
        text = json.dumps(self.as_dict(), indent=2, ensure_ascii=False)
        return text.encode(errors="backslashreplace").decode()  # of half a surrogate pair that is its escape in JSON

    def write(self, path: Path) -> None:
        """Write the report to ``path``, in place of an earlier one, in one step; of a link, where it leads.

        Raises:
            OutputError: it cannot be written there, or a device or pipe is there, which nothing may replace.
        """
        path = Path(os.path.realpath(path))
        if os.path.exists(path) and not path.is_file():
            raise OutputError(
                f"The report cannot be written: {path.name} is no regular file.",
                "Name a --report file; --json prints the report.",
            )
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_text(self.dump() + "\n", encoding="utf-8")
            os.replace(temporary, path)
        except OSError as error:
            raise OutputError(
                f"The report cannot be written: {error.strerror}.", "Name another --report file."
            ) from error
