"""A model repository at one commit, of which files are downloaded into the client's cache as they are asked for."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.errors import (
    CheckpointError,
    CredentialError,
    ExportError,
    HubRefusedError,
    HubUnreachableError,
    OutputError,
    UsageError,
)
from exporter.hub.account import find_token
from exporter.hub.client import HubClient, bounded_and_quiet

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

_MODEL_ID = re.compile(r"(?P<repo_id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w.][\w./-]*))?", re.ASCII)
_DISK_ERRORS = frozenset(
    [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST]
)


@dataclass(frozen=True)
class ModelId:
    """A model on the Hub: NAMESPACE/NAME, and a branch, tag, commit or None for the default branch."""

    repo_id: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> ModelId | None:
        """``NAMESPACE/NAME[@REVISION]``; None where ``text`` cannot be that."""
        found = _MODEL_ID.fullmatch(text)
        return cls(found["repo_id"], found["revision"]) if found else None

    def __str__(self) -> str:
        return f"{self.repo_id}@{self.revision}" if self.revision else self.repo_id


@dataclass(frozen=True)
class HubAccess:
    """How the Hub is read. ``token`` None means the client's own, if there is one, ``cache`` None the client's own.

    ``bars`` permits the client's progress bars, which appear on a terminal only.
    """

    token: str | None = None
    cache: Path | None = None
    bars: bool = False

    @property
    def cache_folder(self) -> Path:
        from huggingface_hub import constants

        return self.cache or Path(constants.HF_HUB_CACHE)


@dataclass(frozen=True)
class Checkout:
    """``folder`` holds those of the repository's ``files`` that were asked for so far.

    ``client`` is None while HF_HUB_OFFLINE is set: then ``files`` are those that the cache has.
    """

    repo_id: str
    commit: str
    folder: Path
    files: frozenset[str]
    access: HubAccess
    client: HubClient | None

    def fetch(self, names: Iterable[str]) -> None:
        """Have the files ``names`` in :attr:`folder`.

        Raises:
            CredentialError: the repository is gated and the token has no access.
            HubUnreachableError: the Hub does not answer.
            OutputError: the cache cannot be written.
        """
        if self.client is None:
            return
        with bounded_and_quiet(bars=self.access.bars):
            for name in names:
                _download(self.client, self.repo_id, name, self.commit, self.access)


def check_out(model: ModelId, access: HubAccess, first: str = "config.json") -> Checkout:
    """The repository of ``model`` at the commit that its revision means now; the file ``first`` is there already.

    With HF_HUB_OFFLINE nothing is asked, and the revision means what it meant when it was last downloaded.

    Raises:
        UsageError: there is no such model or revision, as far as the token may see.
        CheckpointError: the repository has no such file.
        CredentialError: it is gated and the token has no access.
        HubUnreachableError: the Hub does not answer, or must not be asked and nothing is in the cache.
    """
    from huggingface_hub import constants, is_offline_mode

    if is_offline_mode():
        return _from_cache(model, access, first)
    with bounded_and_quiet():
        client = HubClient(constants.ENDPOINT.rstrip("/"), find_token(access.token) or "")
        info = client.ask(f"describe {model}", lambda: _look(client, model))
        files = frozenset(sibling.rfilename for sibling in info.siblings or ())
        if first not in files:
            raise CheckpointError(f"{model} has no {first}.", "Name a model repository that transformers can load.")
        # Asked for by its revision, so that the cache remembers which commit that is.
        folder = _download(client, model.repo_id, first, model.revision, access).parent
        if folder.name != info.sha:
            raise HubRefusedError(f"{model} was changed while it was read.", "Run the same command again.")
        return Checkout(model.repo_id, folder.name, folder, files, access, client)


def find_in_cache(model: ModelId, cache: Path | None = None, first: str = "config.json") -> Path | None:
    """The folder with what the ``cache`` (None: the client's own) has of ``model``; None where it lacks ``first``.

    Nothing is asked of the Hub: a revision means what it meant when it was last downloaded.
    """
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model.repo_id, first, cache_dir=cache, revision=model.revision)
    return Path(found).parent if isinstance(found, str) else None


def _look(client: HubClient, model: ModelId) -> ModelInfo:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return client.api.model_info(model.repo_id, revision=model.revision)
    except GatedRepoError as error:
        raise _gated(client, model.repo_id) from error
    except RepositoryNotFoundError as error:
        raise UsageError(
            f"There is no folder and no model {model.repo_id} on the Hub"
            f"{'' if client.token else ', as far as can be seen without a token'}.",
            "Check the name of the folder or model; for a private model set HF_TOKEN.",
        ) from error
    except RevisionNotFoundError as error:
        raise UsageError(
            f"{model.repo_id} has no revision {model.revision}.", "Name a branch, a tag or a commit of the model."
        ) from error


def _download(client: HubClient, repo_id: str, name: str, revision: str | None, access: HubAccess) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import GatedRepoError

    def download() -> str:
        try:
            return hf_hub_download(
                repo_id,
                name,
                revision=revision,
                endpoint=client.endpoint,
                token=client.token or False,
                cache_dir=access.cache,
            )
        except GatedRepoError as error:
            raise _gated(client, repo_id) from error
        except OSError as error:
            if error.errno not in _DISK_ERRORS:
                raise
            raise OutputError(
                f"{name} of {repo_id} cannot be kept: {error.strerror}.", "Name another folder with --cache_dir."
            ) from error

    return Path(client.ask(f"send {name} of {repo_id}", download))


def _gated(client: HubClient, repo_id: str) -> ExportError:
    return CredentialError(
        f"{repo_id} is gated, and {'the token has no access' if client.token else 'there is no token'}.",
        f"Ask for access at {client.endpoint}/{repo_id}, and set HF_TOKEN.",
    )


def _from_cache(model: ModelId, access: HubAccess, first: str) -> Checkout:
    folder = find_in_cache(model, access.cache, first)
    if folder is None:
        raise HubUnreachableError(
            f"{model} is neither a folder nor in the cache, and HF_HUB_OFFLINE is set.",
            "Unset HF_HUB_OFFLINE, or name the cache that has it with --cache_dir.",
        )
    files = frozenset(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return Checkout(model.repo_id, folder.name, folder, files, access, None)
