"""A published revision, downloaded whole, as anybody would get it."""

from __future__ import annotations

from pathlib import Path

from exporter.hub.client import bounded_and_quiet


def download(repo_id: str, revision: str, *, endpoint: str, token: str, cache: Path) -> Path:
    """The folder in ``cache`` with all files of ``revision``."""
    from huggingface_hub import snapshot_download

    with bounded_and_quiet():
        folder = snapshot_download(repo_id, revision=revision, endpoint=endpoint, token=token, cache_dir=cache)
    return Path(folder)
