"""Where a release goes and what its commit is called."""

from __future__ import annotations

import re
from dataclasses import dataclass

from exporter.errors import UsageError

DEFAULT_BRANCH = "main"

_NO_REF = re.compile(
    r"(^|/)\.|\.\.|[\x00-\x20\x7f~^:?*\[\\]|^-|^/|//|/$|\.$|\.lock(/|$)|@\{|^@$|^$|^HEAD$|^refs/|^[0-9a-f]{40}$"
)
"""What git-check-ref-format(1) forbids in the name of a branch or tag, and names that mean something else."""


@dataclass(frozen=True)
class Destination:
    """A model repository and the way to commit to it.

    ``private`` is the visibility of a repository that has to be created; an existing one keeps its own.
    ``commit_message`` None means "Publish NAME"; what follows its first line is the commit's description.

    Raises:
        UsageError: ``repo_id`` is no NAMESPACE/NAME that a Hub can have, a branch or tag has a name that git does not
            take, or the options contradict each other.
    """

    repo_id: str
    revision: str = DEFAULT_BRANCH
    private: bool = True
    create_pr: bool = False
    release_tag: str | None = None
    commit_message: str | None = None

    def __post_init__(self) -> None:
        require_repo_id(self.repo_id)
        _require_ref_name("--revision", self.revision)
        if self.release_tag:
            _require_ref_name("--release_tag", self.release_tag)
        if self.release_tag == self.revision:
            raise UsageError(
                f"{self.revision} cannot be the name of a branch and of a tag",
                "Give --release_tag a name of its own, such as v1.",
            )
        if self.create_pr and self.revision != DEFAULT_BRANCH:
            raise UsageError(
                f"A pull request is made against {DEFAULT_BRANCH}, not against {self.revision}",
                "Use either --create_pr or --revision.",
            )
        if self.create_pr and self.release_tag:
            raise UsageError(
                f"A pull request cannot be tagged {self.release_tag}: it is not released before it is merged",
                "Use either --create_pr or --release_tag.",
            )

    @property
    def namespace(self) -> str:
        """The user or organization that owns the repository."""
        return self.repo_id.split("/")[0]

    @property
    def summary(self) -> str:
        """The first line of the commit, and the title of a pull request."""
        return self._message[0] or f"Publish {self.repo_id.split('/')[1]}"

    @property
    def description(self) -> str:
        """The rest of the commit's message."""
        return self._message[2].strip()

    @property
    def _message(self) -> tuple[str, str, str]:
        return (self.commit_message or "").strip().partition("\n")


def _require_ref_name(option: str, name: str) -> None:
    """Raises UsageError unless ``name`` can be that of a branch or tag: known before there is a commit to name."""
    if _NO_REF.search(name):
        raise UsageError(
            f"{option} {name!r} is not the name of a branch or tag", "Use letters, digits, '-', '_', '.' and '/'."
        )


def require_repo_id(repo_id: str) -> None:
    """Raises UsageError unless ``repo_id`` is NAMESPACE/NAME as the Hub allows it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UsageError(
            f"{repo_id!r} is not a repository name",
            "Use NAMESPACE/NAME with letters, digits, '-', '_' and '.', at most 96 characters.",
        ) from error
    if "/" not in repo_id:
        raise UsageError(f"{repo_id!r} has no namespace", f"Name the owner too: NAMESPACE/{repo_id}.")
