"""Credentials in text: found by the marks that their issuers gave them, so that none is published or printed.

A mark is a string that is searched for as it stands; only where it is found a pattern is matched, so a large tokenizer
costs one pass per mark. The patterns are strict: what they match is a credential, not a word of a vocabulary. The
forms are those that the issuers document, as collected by GitHub's secret scanning, gitleaks and detect-secrets.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from exporter.errors import RefusedError

REDACTED = b"<redacted>"
SHORTEST_TOKEN = 8
"""Characters; a shorter string is no token, and would be found everywhere."""


class _Form(NamedTuple):
    """A kind of credential: the marks that begin it, and the pattern of the whole."""

    kind: str
    marks: tuple[bytes, ...]
    pattern: re.Pattern[bytes]


class Finding(NamedTuple):
    """A credential in a text: ``start`` and ``end`` in bytes, ``line`` from 1."""

    kind: str
    line: int
    start: int
    end: int


def _form(kind: str, marks: str, pattern: str) -> _Form:
    """Marks are separated by spaces; a pattern begins where a mark does."""
    return _Form(kind, tuple(mark.encode() for mark in marks.split()), re.compile(pattern.encode()))


def _word(kind: str, marks: str, pattern: str) -> _Form:
    r"""A form that does not begin in the middle of a word; the ``n`` of an escaped line end (``\n``) is no word."""
    return _form(kind, marks, rf"(?:(?<![A-Za-z0-9])|(?<=\\[nrt]))(?:{pattern})")


_NAMES = (
    "api_key API_KEY api-key secret_access_key SECRET_ACCESS_KEY session_token SESSION_TOKEN client_secret "
    "CLIENT_SECRET account_key ACCOUNT_KEY hf_token HF_TOKEN hub_token HUB_TOKEN auth_token AUTH_TOKEN access_token "
    "ACCESS_TOKEN GITHUB_TOKEN GH_TOKEN CI_JOB_TOKEN api_token API_TOKEN api_secret API_SECRET wandb_key"
)
"""Names of settings and environment variables whose value is a credential of any form."""

_VALUE = r"(?=[A-Za-z_/+=-]{0,255}[0-9])[A-Za-z0-9_/+=-]{20,256}(?![A-Za-z0-9_.(\[-])"
"""A value that no word, call or reference to a variable is: long, in one piece, with a digit."""

_NAMED = _word(
    "a credential", _NAMES, rf"(?:{'|'.join(_NAMES.split())})[\"']?\]?(?:[ \t]*[:=][ \t]*|[ \t]+)[\"']?{_VALUE}"
)
"""What only the name beside it shows; said where no other form is found, since a value can have both."""

_FORMS = (
    _word("a Hugging Face token", "hf_", r"hf_[A-Za-z0-9]{30,256}|hf_(?:jwt|oauth)_[A-Za-z0-9_.-]{20,4096}"),
    _word("a Hugging Face organization token", "api_org_", r"api_org_[A-Za-z0-9]{30,256}"),
    _word("an AWS access key", "AKIA ASIA", r"A[KS]IA[A-Z0-9]{16}(?![A-Za-z0-9])"),
    _word("a Google API key", "AIza", r"AIza[A-Za-z0-9_-]{35}(?![A-Za-z0-9])"),
    _word("a Google OAuth token", "ya29. GOCSPX-", r"ya29\.[A-Za-z0-9_-]{30,2048}|GOCSPX-[A-Za-z0-9_-]{24,64}"),
    _word("an Azure key", "AccountKey= SharedAccessKey=", r"(?:Account|SharedAccess)Key=[A-Za-z0-9+/]{40,256}=*"),
    _word("an Azure shared access signature", "sig=", r"(?<=[?&])sig=(?:[A-Za-z0-9+/]|%2[BbFf]){40,256}(?:%3[Dd]|=)"),
    _word("a GitHub token", "ghp_ gho_ ghu_ ghs_ ghr_", r"gh[pousr]_[A-Za-z0-9]{36,256}"),
    _word("a GitHub token", "github_pat_", r"github_pat_[A-Za-z0-9_]{36,256}"),
    _word("a GitLab token", "glpat- gldt- glrt- glptt-", r"gl(?:pat|dt|rt|ptt)-[A-Za-z0-9_-]{20,256}"),
    _word("a Slack token", "xoxb- xoxp- xoxa- xoxr- xoxs- xapp-", r"x(?:ox[bpars]|app)-[0-9][A-Za-z0-9-]{10,256}"),
    _word(
        "a Slack webhook", "hooks.slack.com/", r"hooks\.slack\.com/services/T[A-Z0-9]{6,32}/B[A-Z0-9]{6,32}/\w{16,64}"
    ),
    _word(
        "an API key of a model provider",
        "sk-",
        r"sk-(?:(?:proj|svcacct|admin|ant|or)-[A-Za-z0-9_-]{32,512}|[A-Za-z0-9]{32,256}(?![A-Za-z0-9]))",
    ),
    _word("an API key of a model provider", "gsk_ xai- nvapi-", r"(?:gsk_|xai-|nvapi-)[A-Za-z0-9_-]{48,256}"),
    _word("an API key of a model provider", "pplx- tgp_v1_ r8_", r"(?:pplx-|tgp_v1_|r8_)[A-Za-z0-9_-]{37,256}"),
    _word("a Databricks token", "dapi", r"dapi[0-9a-f]{32}(?![A-Za-z0-9])"),
    _word("a DigitalOcean token", "dop_v1_ doo_v1_ dor_v1_", r"do[opr]_v1_[0-9a-f]{64}"),
    _word("a package registry's token", "npm_ pypi-AgE", r"npm_[A-Za-z0-9]{36}(?![A-Za-z0-9])|pypi-AgE[\w-]{50,1024}"),
    _word("a Stripe key", "sk_live_ rk_live_", r"[rs]k_live_[A-Za-z0-9]{20,256}"),
    _word("a SendGrid key", "SG.", r"SG\.[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43}(?![A-Za-z0-9])"),
    _word("a JSON Web Token", "eyJ", r"eyJ[\w-]{10,4096}\.eyJ[\w-]{10,4096}\.[\w-]{20,4096}"),
    _word("a Weights & Biases key", "wandb_v1_", r"wandb_v1_[A-Za-z0-9_]{32,256}"),
    _word("a private key", "AGE-SECRET-KEY-", r"AGE-SECRET-KEY-1[A-Z0-9]{58}"),
    _form("a private key", "-----BEGIN", r"-----BEGIN (?:[A-Z0-9]{1,16} ){0,3}PRIVATE KEY(?: BLOCK)?-----"),
    _form("a password in a URL", "://", r"""://[^\s/?#:@"'<>$\\{]{1,128}:[^\s/?#:@"'<>$\\{]{3,256}@[A-Za-z0-9\[]"""),
    _NAMED,
)


def find_credentials(content: bytes, tokens: Iterable[str] = ()) -> Iterator[Finding]:
    """The credentials in ``content``, at most one of each kind, and ``tokens`` themselves, whatever form they have."""
    known = False
    for token in tokens:
        start = content.find(token.encode(errors="surrogateescape"))
        if len(token) >= SHORTEST_TOKEN and start >= 0:
            yield _finding("the token of this run", content, start, start + len(token))
    for form in _FORMS:
        found = next(_matches(form, content), None)
        if found is not None and not (known and form is _NAMED):
            known = True
            yield _finding(form.kind, content, *found.span())


def _matches(form: _Form, content: bytes) -> Iterator[re.Match[bytes]]:
    for mark in form.marks:
        start = content.find(mark)
        while start >= 0:
            if found := form.pattern.match(content, start):
                yield found
            start = content.find(mark, start + 1)


def _finding(kind: str, content: bytes, start: int, end: int) -> Finding:
    return Finding(kind, content.count(b"\n", 0, start) + 1, start, end)


def require_no_credentials(texts: Mapping[str, bytes], tokens: Iterable[str] = ()) -> None:
    """None of ``texts`` (by what they are called) holds a credential or one of ``tokens``.

    Raises:
        RefusedError: one does; its name, the lines and the kinds are said, and never the credential.
    """
    known = tuple(tokens)
    for name, content in texts.items():
        found = sorted(find_credentials(content, known), key=lambda finding: finding.start)
        if found:
            places = ", ".join(f"{finding.kind} in line {finding.line}" for finding in found[:3])
            raise RefusedError(
                f"{name} holds {places}{', …' if len(found) > 3 else ''}: it would be published.",
                "Remove it there, and revoke it where it was issued: whoever read the checkpoint has it too.",
            )


def redact(text: str, tokens: Iterable[str] = ()) -> str:
    """``text`` with every credential in it, and with ``tokens``, taken out."""
    content = text.encode(errors="surrogatepass")
    for token in tokens:
        if len(token) >= SHORTEST_TOKEN:
            content = content.replace(token.encode(errors="surrogatepass"), REDACTED)
    for form in _FORMS:
        if any(mark in content for mark in form.marks):
            content = form.pattern.sub(REDACTED, content)
    return content.decode(errors="surrogatepass")


def redact_values(value: Any, tokens: Iterable[str] = ()) -> Any:
    """``value``, which JSON could hold, with every string in it redacted, those that are names too."""
    if isinstance(value, str):
        return redact(value, tokens)
    if isinstance(value, Mapping):
        return {redact(str(name), tokens): redact_values(item, tokens) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact_values(item, tokens) for item in value]
    return value
