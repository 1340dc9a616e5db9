"""A folder that was exported without secrets is published later, exactly as it stands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exporter.console import Console
from exporter.errors import UsageError, VerificationError
from exporter.rehearsal import RehearsalHub
from exporter.release import PublishOptions, run_publish
from exporter.report import Report
from tests.conftest import Case

Export = Callable[..., tuple[Path, dict[str, Any]]]
NAME = "Org/model"


def release(folder: Path, **options: Any) -> dict[str, Any]:
    report = Report()
    run_publish(PublishOptions(folder, **options), report, Console(quiet=True))
    return report.as_dict()


@pytest.fixture
def folder(export: Export) -> Path:
    return export(Case("llama-zero3").checkpoint, hf_repo_name=NAME, no_publish=True)[0]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    with RehearsalHub(organizations=["Org"]) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        yield hub


def test_a_folder_is_published_as_it_stands_in_one_commit_and_again_unchanged(folder: Path, hub: RehearsalHub) -> None:
    assert release(folder, auth_token=hub.token, release_tag="v1")["status"] == "published"
    tree = hub.repositories[NAME].resolve("v1").tree
    assert {path: hub.read(NAME, path) for path in tree if path != ".gitattributes"} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }
    assert release(folder, auth_token=hub.token)["status"] == "unchanged"
    assert len(hub.repositories[NAME].history("main")) == 2


def test_a_changed_folder_is_not_published(folder: Path, hub: RehearsalHub) -> None:
    (folder / "config.json").write_text("{}")
    with pytest.raises(VerificationError, match=r"config\.json"):
        release(folder, auth_token=hub.token)
    assert hub.repositories == {}


def test_a_folder_is_published_only_under_the_name_on_its_card(folder: Path, hub: RehearsalHub, export: Export) -> None:
    with pytest.raises(UsageError, match="exported for Org/model"):
        release(folder, auth_token=hub.token, hf_repo_name="Org/other")
    nameless, _ = export(Case("llama-zero3").checkpoint)
    with pytest.raises(UsageError, match="no repository"):
        release(nameless, auth_token=hub.token, hf_repo_name=NAME)
    assert hub.repositories == {}
