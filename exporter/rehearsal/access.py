"""Who may do what on the rehearsal Hub."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from exporter.rehearsal.repository import Refusal


@dataclass(frozen=True)
class Token:
    """An access token: ``role`` is read, write or fineGrained, which may write to the users, organizations or
    repositories named in ``scopes``."""

    user: str
    role: str = "write"
    expired: bool = False
    scopes: tuple[str, ...] = ()

    def may_write(self, repo_id: str) -> bool:
        return self.role == "write" or (
            self.role == "fineGrained" and not {repo_id, repo_id.split("/")[0]}.isdisjoint(self.scopes)
        )

    def require_write(self, repo_id: str) -> None:
        if not self.may_write(repo_id):
            raise Refusal(403, f"You do not have the rights to write to {repo_id}")

    def description(self, organizations: Iterable[str]) -> dict[str, object]:
        """The answer to ``whoami-v2``."""
        return {
            "type": "user",
            "id": self.user,
            "name": self.user,
            "fullname": self.user,
            "isPro": False,
            "orgs": [
                {"type": "org", "id": name, "name": name, "fullname": name, "roleInOrg": "admin"}
                for name in organizations
            ],
            "auth": {"type": "access_token", "accessToken": self._access_token()},
        }

    def _access_token(self) -> dict[str, object]:
        token: dict[str, object] = {"displayName": "rehearsal", "role": self.role}
        if self.role == "fineGrained":
            token["fineGrained"] = {"global": [], "scoped": [self._scope(name) for name in self.scopes]}
        return token

    def _scope(self, name: str) -> dict[str, object]:
        kind = "model" if "/" in name else "user" if name == self.user else "org"
        return {
            "entity": {"_id": name, "type": kind, "name": name},
            "permissions": ["repo.content.read", "repo.write"],
        }


def authenticate(tokens: dict[str, Token], authorization: str | None, code: str | None = None) -> Token | None:
    """The token of a request, None for an anonymous one. ``code`` is the error code that an expired one gets."""
    if authorization is None:
        return None
    token = tokens.get(authorization.removeprefix("Bearer "))
    if token is None:
        raise Refusal(401, "Invalid credentials in Authorization header")
    if token.expired:
        raise Refusal(401, 'User Access Token "rehearsal" is expired', code)
    return token
