"""What a user may be told: one line that says what is wrong, one line with the next step, and an exit code.

Every expected failure is an :class:`ExportError`. Anything else that reaches the command line is a bug and keeps its
traceback (exit code 1).
"""

from __future__ import annotations

from typing import ClassVar


class ExportError(Exception):
    """An expected failure.

    ``message`` says what, which file, and what was found and expected; ``hint`` says what to do next. ``exit_code``
    and ``kind`` are part of the published contract (exit status and the report's ``error`` object).
    """

    exit_code: ClassVar[int]
    kind: ClassVar[str]

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(ExportError):
    """The command itself cannot be right: an unknown name, a bad size, an output folder inside the input."""

    exit_code = 2
    kind = "usage"


class CheckpointError(ExportError):
    """The checkpoint is incomplete, damaged or unsafe to read."""

    exit_code = 3
    kind = "checkpoint"


class IncompleteCheckpointError(CheckpointError):
    """A file of the checkpoint is not there (yet): an older checkpoint of the same run may be whole."""


class RefusedError(ExportError):
    """Going on would change or lose something that nobody asked to change or lose."""

    exit_code = 4
    kind = "refused"


class OutputError(ExportError):
    """The output folder or the disk does not take the export."""

    exit_code = 5
    kind = "output"


class CredentialError(ExportError):
    """No token, a bad token, or a token without the rights that this release needs."""

    exit_code = 6
    kind = "credential"


class HubRefusedError(ExportError):
    """The Hub was reached and said no: a commit in between, a quota, an invalid card."""

    exit_code = 7
    kind = "hub_refused"


class HubUnreachableError(ExportError):
    """The Hub could not be reached, after retries."""

    exit_code = 8
    kind = "hub_unreachable"


class VerificationError(ExportError):
    """What was written or published is not what the checkpoint says."""

    exit_code = 9
    kind = "verification"
