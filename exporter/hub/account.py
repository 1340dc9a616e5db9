"""The token, and what the Hub says it may write."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from exporter.errors import CredentialError, HubUnreachableError
from exporter.hub.client import HubClient
from exporter.hub.destination import Destination
from exporter.hub.failures import is_retriable
from exporter.hub.patience import RETRY_LATER

_NEW_TOKEN = "Make a token with write access in the Hub's settings and pass it as HF_TOKEN."


def resolve_token(token: str | None) -> str:
    """The token given, else the client's own: OIDC (HF_OIDC_RESOURCE), then HF_TOKEN, then the saved login.

    Raises CredentialError if there is none, or what is there cannot be one.
    """
    found = (token or _configured_token() or "").strip()
    if not found:
        raise CredentialError(
            "Publishing needs a token, and there is none", "Set HF_TOKEN, or log in with: hf auth login"
        )
    if not found.isascii() or not found.isprintable() or " " in found:
        raise CredentialError("The token holds characters that no token has", "Copy the token again, and nothing else.")
    return found


def find_token(token: str | None) -> str | None:
    """The token given, else the client's own, else None: what is public can be read without.

    Raises CredentialError if what is there cannot be a token.
    """
    return resolve_token(token) if has_token(token) else None


def has_token(token: str | None) -> bool:
    """Whether a token was given or is configured, or a CI job can have one; nothing is said of whether it is good."""
    return bool(token or os.environ.get("HF_OIDC_RESOURCE") or _configured_token())


def known_tokens(token: str | None) -> tuple[str, ...]:
    """The token given and those that this machine keeps for the Hub: what must never be published. Asks nobody."""
    from huggingface_hub import constants

    names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_ID_TOKEN", "ACTIONS_ID_TOKEN_REQUEST_TOKEN")
    login = Path(constants.HF_TOKEN_PATH)
    is_there = os.path.isfile(login) and os.access(login, os.R_OK)
    saved = login.read_text(encoding="utf-8", errors="replace") if is_there else ""
    found = (token or "", saved, *(os.environ.get(name, "") for name in names))
    return tuple(filter(None, (text.strip() for text in found)))


def _configured_token() -> str | None:
    from huggingface_hub import get_token
    from huggingface_hub.errors import OIDCError
    from huggingface_hub.utils import httpx

    try:
        return get_token()
    except (OIDCError, httpx.HTTPError) as error:
        if is_retriable(error):
            raise HubUnreachableError(
                f"No token for HF_OIDC_RESOURCE, since nobody answers: {' '.join(str(error).split())}", RETRY_LATER
            ) from error
        raise CredentialError(
            f"HF_OIDC_RESOURCE is set, but the Hub gave no token for it: {' '.join(str(error).split())}",
            "Check the trusted publisher on the Hub and the job's id-token permission, or unset HF_OIDC_RESOURCE.",
        ) from error
    except OSError as error:
        raise CredentialError(
            f"The saved login cannot be read: {error.strerror}", "Set HF_TOKEN, or log in again with: hf auth login"
        ) from error


def ask_account(client: HubClient, destination: Destination) -> Mapping[str, Any]:
    """The answer of whoami-v2; empty for a token of a trusted publisher, which has a repository and no account.

    Raises CredentialError unless the account may write to ``destination``.
    """
    try:
        account: Mapping[str, Any] = client.ask("accept the token", lambda: client.api.whoami())
    except CredentialError:
        if not is_publisher(client.token):
            raise
        account = {}
    require_write_access(account, destination)
    resource = os.environ.get("HF_OIDC_RESOURCE")
    if is_publisher(client.token) and resource and not _same_name(resource, destination.repo_id):
        raise CredentialError(
            f"The token for HF_OIDC_RESOURCE={resource} may not write to {destination.repo_id}",
            f"Set HF_OIDC_RESOURCE to {destination.repo_id}, or unset it and give a token as HF_TOKEN.",
        )
    if destination.create_pr and not account:
        raise CredentialError(
            "A trusted publisher's token has no name, so its open pull request could not be found again",
            "Publish to a branch with --revision, or give a token as HF_TOKEN.",
        )
    return account


def is_publisher(token: str) -> bool:
    """Whether ``token`` is a trusted publisher's: https://huggingface.co/docs/hub/trusted-publishers."""
    return token.startswith("hf_jwt_")


def require_write_access(account: Mapping[str, Any], destination: Destination) -> None:
    """Raises CredentialError unless ``account`` (the answer of whoami-v2) may write to ``destination``.

    What the answer does not say, such as the role of an OIDC token, is left for the Hub to decide. A pull request
    needs no right to the namespace.
    """
    token = (account.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise CredentialError(f"The token of {account.get('name')} may only read", _NEW_TOKEN)
    if not destination.create_pr:
        _require_membership(account, destination.namespace)
    if token.get("role") == "fineGrained":
        _require_scope(token.get("fineGrained") or {}, destination)


def _require_membership(account: Mapping[str, Any], namespace: str) -> None:
    if "orgs" not in account or _same_name(account.get("name"), namespace):
        return
    organization = next((org for org in account["orgs"] if _same_name(org.get("name"), namespace)), None)
    if organization is None:
        raise CredentialError(
            f"{account.get('name')}, whose token this is, is not a member of {namespace}",
            "Publish to a namespace of your own, or ask to be made a member.",
        )
    if organization.get("roleInOrg") == "read":
        raise CredentialError(
            f"{account.get('name')}, whose token this is, may only read in {namespace}",
            f"Ask an administrator of {namespace} for the role contributor or write.",
        )


def _require_scope(rights: Mapping[str, Any], destination: Destination) -> None:
    needed = {"repo.write", "discussion.write"} if destination.create_pr else {"repo.write"}
    if needed.isdisjoint(_granted(rights, destination)):
        raise CredentialError(
            f"The fine-grained token has no write permission for {destination.repo_id}",
            f"Give it {' or '.join(sorted(needed))} for {destination.namespace} in the Hub's settings.",
        )


def _granted(rights: Mapping[str, Any], destination: Destination) -> Iterable[str]:
    yield from rights.get("global") or ()
    for scope in rights.get("scoped") or ():
        name = (scope.get("entity") or {}).get("name")
        if _same_name(name, destination.namespace) or _same_name(name, destination.repo_id):
            yield from scope.get("permissions") or ()


def _same_name(name: object, other: str) -> bool:
    return isinstance(name, str) and name.casefold() == other.casefold()
