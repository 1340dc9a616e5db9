"""The publishing transaction, by the real huggingface_hub client against the rehearsal Hub."""

from __future__ import annotations

import hashlib
import json
import socket
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.utils import httpx
from safetensors.torch import save

from exporter.errors import (
    CredentialError,
    ExportError,
    HubRefusedError,
    HubUnreachableError,
    OutputError,
    UsageError,
    VerificationError,
)
from exporter.hub import (
    Connection,
    Destination,
    Forecast,
    OutgoingFile,
    Publication,
    Push,
    RemoteFile,
    connect,
    plan_push,
    prove_published,
)
from exporter.hub import client as hub_client
from exporter.hub.account import require_write_access
from exporter.hub.failures import translate
from exporter.hub.patience import Patience, requested_pause
from exporter.hub.repository import manifest_files
from exporter.hub.upload import batches, without_xet
from exporter.rehearsal import RehearsalHub

REPO = "org/tiny"
CARD = "---\nlibrary_name: transformers\n---\n# Tiny\n"
CHANGING = {"POST", "PUT", "DELETE", "PATCH"}
Call = Callable[..., Any]
ASKING = ("/api/validate-yaml", "/preupload/")


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_client, "_PAUSES", (0.01, 0.01, 0.01, 0.01))


def export(folder: Path, files: dict[str, bytes]) -> list[OutgoingFile]:
    """``files`` and their manifest as an exported folder."""
    folder.mkdir(exist_ok=True)
    manifest = {"files": [{"path": name, "size": len(data), "sha256": sha256(data)} for name, data in files.items()]}
    outgoing = []
    for name, data in {**files, "export.json": json.dumps(manifest).encode()}.items():
        (folder / name).write_bytes(data)
        outgoing.append(OutgoingFile(name, folder / name, len(data), sha256(data)))
    return outgoing


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def safetensors(tensors: dict[str, bytes]) -> bytes:
    return save({name: torch.tensor(list(data), dtype=torch.uint8) for name, data in tensors.items()})


def release(seed: int = 0, shards: int = 2, **more: bytes) -> dict[str, bytes]:
    weights = {
        f"model-{i:05}-of-{shards:05}.safetensors": safetensors({f"weight{i}": bytes([seed, i]) * 100_000})
        for i in range(1, shards + 1)
    }
    return {"README.md": CARD.encode(), "config.json": b"{}", "tokenizer.json": b'{"a": 1}', **weights, **more}


def connected(hub: RehearsalHub, token: str | None = None, **options: Any) -> Connection:
    return connect(Destination(REPO, **options), token=token or hub.token, endpoint=hub.endpoint, card=CARD)


def published(hub: RehearsalHub, files: list[OutgoingFile], **options: Any) -> Publication:
    return Push(connected(hub, **options)).commit(files)


def api_of(hub: RehearsalHub) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=hub.token)


def tree(hub: RehearsalHub, revision: str = "main") -> set[str]:
    return {entry.path for entry in api_of(hub).list_repo_tree(REPO, recursive=True, revision=revision)}


def commits(hub: RehearsalHub, revision: str = "main") -> list[str]:
    return [commit.commit_id for commit in api_of(hub).list_repo_commits(REPO, revision=revision)]


def commit_by_somebody_else(hub: RehearsalHub, files: dict[str, bytes], revision: str = "main") -> None:
    operations = [CommitOperationAdd(path, data) for path, data in files.items()]
    with nullcontext() if hub.xet else without_xet():
        api_of(hub).create_commit(REPO, operations, commit_message="by hand", revision=revision)


def changes(hub: RehearsalHub) -> list[tuple[str, str]]:
    """The requests that change something on the Hub."""
    return [
        (method, path)
        for method, path in hub.requests
        if method in CHANGING and not any(asking in path for asking in ASKING)
    ]


# What a push does


def remote_file(path: str, data: bytes, *, large: bool = True) -> RemoteFile:
    return RemoteFile(path, len(data), sha256(data) if large else None, "0" * 40)


def local_file(path: str, data: bytes) -> OutgoingFile:
    return OutgoingFile(path, Path(path), len(data), sha256(data))


def test_a_plan_adds_what_is_new_replaces_what_differs_and_leaves_what_is_the_same() -> None:
    outgoing = [local_file("new", b"n"), local_file("changed", b"c"), local_file("same", b"s")]
    plan = plan_push(outgoing, {"changed": remote_file("changed", b"C"), "same": remote_file("same", b"s")})
    assert (plan.added, plan.replaced, plan.unchanged) == (("new",), ("changed",), ("same",))
    assert plan.sent == ("changed", "new")
    assert not plan.is_empty


@pytest.mark.parametrize(("blob_id", "unchanged"), [("0" * 40, ("card",)), ("1" * 40, ())])
def test_a_regular_file_is_compared_by_its_git_blob_id(blob_id: str, unchanged: tuple[str, ...]) -> None:
    remote = {"card": remote_file("card", b"c", large=False)}
    assert plan_push([local_file("card", b"c")], remote, blob_ids={"card": blob_id}).unchanged == unchanged


def test_a_git_blob_id_is_the_one_that_git_gives(tmp_path: Path) -> None:
    (tmp_path / "hello").write_bytes(b"hello\n")
    file = OutgoingFile("hello", tmp_path / "hello", 6, sha256(b"hello\n"))
    assert (
        file.git_blob_id() == "ce013625030ba8dba906f756967f9e9ca394464a"
    )  # printf 'hello\n' | git hash-object --stdin


@pytest.mark.parametrize(
    "path",
    [
        "model.safetensors",
        "adapter_config.json",
        "adapter_model.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model.bin.index.json",
    ],
)
def test_weights_that_from_pretrained_would_find_beside_the_new_ones_are_deleted(path: str) -> None:
    assert plan_push([local_file("config.json", b"{}")], {path: remote_file(path, b"w")}).deleted == (path,)


@pytest.mark.parametrize("path", ["LICENSE", ".gitattributes", "notes.md", "loss.png", "onnx/model.safetensors"])
def test_files_of_other_people_are_kept(path: str) -> None:
    plan = plan_push([local_file("config.json", b"{}")], {path: remote_file(path, b"x")})
    assert (plan.deleted, plan.kept) == ((), (path,))


@pytest.mark.parametrize(("now", "deleted"), [(b"old", ("vocab.json",)), (b"edited", ())])
def test_a_file_of_an_earlier_export_is_deleted_unless_somebody_changed_it(
    now: bytes, deleted: tuple[str, ...]
) -> None:
    owned = {"vocab.json": (len(b"old"), sha256(b"old"))}
    assert plan_push([], {"vocab.json": remote_file("vocab.json", now)}, owned=owned).deleted == deleted


def test_small_files_are_uploaded_together_and_large_ones_alone() -> None:
    sizes = [1, 1, 300 * 1024 * 1024, 1]
    files = [OutgoingFile(str(i), Path(), size, "") for i, size in enumerate(sizes)]
    assert [[file.path for file in batch] for batch in batches(files)] == [["0", "1", "2"], ["3"]]
    assert [len(batch) for batch in batches(files[:1] * 600)] == [256, 256, 88]


# Destinations


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "org/", "/tiny", "org/ti ny", "org/tiny..x", "org/tiny.git"])
def test_a_name_that_no_repository_can_have_is_a_usage_error(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        Destination(name)
    assert name in caught.value.message


def test_a_pull_request_goes_with_neither_another_branch_nor_a_tag() -> None:
    with pytest.raises(UsageError):
        Destination(REPO, create_pr=True, revision="dev")
    with pytest.raises(UsageError):
        Destination(REPO, create_pr=True, release_tag="v1")


@pytest.mark.parametrize(
    "name",
    ["a b", "a..b", "v1~", "-v1", "/v1", "v1/", "a//b", "v1.", ".v1", "v1.lock", "a@{b", "HEAD", "refs/pr/1", "0" * 40],
)
def test_a_name_that_no_branch_or_tag_can_have_is_a_usage_error(name: str) -> None:
    with pytest.raises(UsageError, match="--release_tag"):
        Destination(REPO, release_tag=name)
    with pytest.raises(UsageError, match="--revision"):
        Destination(REPO, revision=name)


@pytest.mark.parametrize("name", ["v1", "v1.0.2", "2024-05-01", "release/1.x", "épreuve", "a@b", "1"])
def test_names_that_git_takes_are_taken(name: str) -> None:
    assert Destination(REPO, release_tag=name).release_tag == name


def test_a_tag_does_not_hide_a_branch(lfs_hub: RehearsalHub, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a branch and of a tag"):
        Destination(REPO, release_tag="main")
    files = export(tmp_path, release())
    published(lfs_hub, files, revision="dev")
    with pytest.raises(HubRefusedError, match="dev is a branch"):
        connected(lfs_hub, release_tag="dev")


# Publishing


def test_a_new_repository_is_private_and_gets_one_commit_with_exactly_the_files(
    hub: RehearsalHub, tmp_path: Path
) -> None:
    files = export(tmp_path, release())
    result = published(hub, files)
    assert api_of(hub).model_info(REPO).private is True
    assert len(commits(hub)) == 2  # the Hub's own first commit, and ours
    assert tree(hub) == {".gitattributes", *(file.path for file in files)}
    assert all(hub.read(REPO, file.path) == file.source.read_bytes() for file in files)
    assert (result.status, result.commit, result.transport) == (
        "published",
        commits(hub)[0],
        "xet" if hub.xet else "lfs",
    )
    assert result.url == f"{hub.endpoint}/{REPO}/tree/{result.commit}"
    assert result.added == tuple(sorted(file.path for file in files))
    assert result.uploaded_bytes == sum(file.size for file in files)


def test_a_public_repository_is_made_only_where_it_is_asked_for(lfs_hub: RehearsalHub, tmp_path: Path) -> None:
    published(lfs_hub, export(tmp_path, release()), private=False)
    assert api_of(lfs_hub).model_info(REPO).private is False


def test_connecting_and_planning_change_nothing_on_the_hub(hub: RehearsalHub, tmp_path: Path) -> None:
    files = export(tmp_path, release())
    connected(hub, revision="dev", release_tag="v1").plan(files)
    assert changes(hub) == []
    published(hub, files)
    hub.requests.clear()
    assert connected(hub, revision="dev", release_tag="v1").plan(files).is_empty
    assert connected(hub, create_pr=True).plan(files).is_empty
    assert changes(hub) == []


def test_the_same_release_again_sends_nothing_and_makes_no_commit(hub: RehearsalHub, tmp_path: Path) -> None:
    files = export(tmp_path, release())
    first = published(hub, files, release_tag="v1")
    hub.requests.clear()
    second = published(hub, files, release_tag="v1")
    assert changes(hub) == []
    assert not [path for _, path in hub.requests if "xet-write-token" in path]
    assert (second.status, second.commit, second.tag) == ("unchanged", first.commit, "v1")
    assert (second.added, second.deleted, second.uploaded_bytes) == ((), (), 0)
    assert second.unchanged == first.added


def test_a_smaller_release_deletes_what_no_longer_belongs_and_keeps_what_people_put_there(
    hub: RehearsalHub, tmp_path: Path
) -> None:
    published(hub, export(tmp_path / "old", {**release(1, shards=3), "merges.txt": b"a b"}))
    commit_by_somebody_else(hub, {"LICENSE": b"mine", "pytorch_model.bin": b"older", "images/loss.png": b"png"})
    before = len(commits(hub))
    files = export(tmp_path / "new", release(2, shards=1))
    result = published(hub, files)
    assert len(commits(hub)) == before + 1
    assert tree(hub) == {
        ".gitattributes", "LICENSE", "images", "images/loss.png", *(file.path for file in files)
    }  # fmt: skip
    assert hub.read(REPO, "LICENSE") == b"mine"
    assert set(result.deleted) == {
        "merges.txt", "pytorch_model.bin", *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))
    }  # fmt: skip
    assert "config.json" in result.unchanged and "config.json" not in result.added


def test_a_commit_in_between_is_refused_before_anything_is_sent(lfs_hub: RehearsalHub, tmp_path: Path) -> None:
    published(lfs_hub, export(tmp_path / "old", release()))
    connection = connected(lfs_hub)
    commit_by_somebody_else(lfs_hub, {"notes.md": b"hello"})
    before = commits(lfs_hub)
    lfs_hub.requests.clear()
    with pytest.raises(HubRefusedError, match="Somebody committed to main"):
        Push(connection).commit(export(tmp_path / "new", release(2)))
    assert (changes(lfs_hub), commits(lfs_hub)) == ([], before)


def test_a_commit_during_the_upload_is_refused_and_the_branch_stays_as_it_is(hub: RehearsalHub, tmp_path: Path) -> None:
    published(hub, export(tmp_path / "old", release()))
    connection = connected(hub, release_tag="v1")
    with pytest.raises(HubRefusedError) as caught:
        Push(connection).commit(
            export(tmp_path / "new", release(2)),
            lambda size: commit_by_somebody_else(hub, {"notes.md": b"hello"}),
        )
    assert "412" in caught.value.message
    assert len(commits(hub)) == 3
    assert hub.read(REPO, "model-00001-of-00002.safetensors") == release()["model-00001-of-00002.safetensors"]
    assert api_of(hub).list_repo_refs(REPO).tags == []


def test_a_branch_is_made_if_absent_and_main_stays_as_it_is(hub: RehearsalHub, tmp_path: Path) -> None:
    published(hub, export(tmp_path / "old", release(1, shards=3)))
    main = commits(hub)
    files = export(tmp_path / "new", release(2, shards=1))
    result = published(hub, files, revision="feature/x")
    assert (commits(hub), commits(hub, "feature/x")) == (main, [result.commit, *main])
    assert tree(hub, "feature/x") == {".gitattributes", *(file.path for file in files)}
    assert result.revision == "feature/x"
    assert published(hub, files, revision="feature/x").status == "unchanged"


def test_a_message_of_several_lines_has_a_title_and_a_description(lfs_hub: RehearsalHub, tmp_path: Path) -> None:
    published(lfs_hub, export(tmp_path, release()), commit_message="\nTitle\n\nFirst line.\nSecond line.\n")
    commit = api_of(lfs_hub).list_repo_commits(REPO)[0]
    assert (commit.title, commit.message) == ("Title", "First line.\nSecond line.")


def test_the_release_tag_is_set_on_the_commit(lfs_hub: RehearsalHub, tmp_path: Path) -> None:
    result = published(lfs_hub, export(tmp_path, release()), release_tag="v1")
    assert [(tag.name, tag.target_commit) for tag in api_of(lfs_hub).list_repo_refs(REPO).tags] == [
        ("v1", result.commit)
    ]
    assert result.tag == "v1"


def test_a_release_that_is_there_untagged_gets_its_tag(lfs_hub: RehearsalHub, tmp_path: Path) -> None:
    files = export(tmp_path, release())
    first = published(lfs_hub, files)
    assert published(lfs_hub, files, release_tag="v1").status == "unchanged"
    assert api_of(lfs_hub).list_repo_refs(REPO).tags[0].target_commit == first.commit


def test_a_tag_on_another_release_is_refused_before_any_upload(lfs_hub: RehearsalHub, tmp_path: Path) -> None:
    published(lfs_hub, export(tmp_path / "old", release(1)), release_tag="v1")
    connection = connected(lfs_hub, release_tag="v1")
    lfs_hub.requests.clear()
    with pytest.raises(HubRefusedError, match="tag v1"):
        Push(connection).commit(export(tmp_path / "new", release(2)))
    assert changes(lfs_hub) == []


def test_a_tag_on_something_that_is_no_export_is_refused_before_a_weight_is_read(lfs_hub: RehearsalHub) -> None:
    api_of(lfs_hub).create_repo(REPO)
    api_of(lfs_hub).create_tag(REPO, tag="v1")
    with pytest.raises(HubRefusedError, match="tag v1"):
        connected(lfs_hub, release_tag="v1")


def test_a_tag_takes_no_commit(lfs_hub: RehearsalHub) -> None:
    api_of(lfs_hub).create_repo(REPO)
    api_of(lfs_hub).create_tag(REPO, tag="v1")
    with pytest.raises(HubRefusedError, match="v1 is a tag"):
        connected(lfs_hub, revision="v1")


def test_an_own_open_pull_request_is_reused(hub: RehearsalHub, tmp_path: Path) -> None:
    published(hub, export(tmp_path / "main", release(1)))
    main = commits(hub)
    files = export(tmp_path / "first", release(2))
    first = published(hub, files, create_pr=True)
    again = published(hub, files, create_pr=True, commit_message="Another title")
    second = published(hub, export(tmp_path / "second", release(3, shards=1)), create_pr=True)
    assert [each.num for each in api_of(hub).get_repo_discussions(REPO)] == [1]
    assert first.pr_url == again.pr_url == second.pr_url == first.url
    assert (first.status, again.status, second.status) == ("published", "unchanged", "published")
    assert "model-00001-of-00002.safetensors" not in tree(hub, "refs/pr/1")
    assert commits(hub, "refs/pr/1") == [second.commit, first.commit, *main]
    assert commits(hub) == main


def test_a_pull_request_of_somebody_else_or_about_something_else_is_not_reused(
    lfs_hub: RehearsalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Call = HfApi.get_repo_discussions
    monkeypatch.setattr(HfApi, "get_repo_discussions", lambda api, repo_id, **selection: real(api, repo_id))
    published(lfs_hub, export(tmp_path / "main", release(1)))
    api_of(lfs_hub).create_commit(REPO, [CommitOperationAdd("notes.md", b"n")], commit_message="Notes", create_pr=True)
    other = lfs_hub.add_token("somebody")
    HfApi(endpoint=lfs_hub.endpoint, token=other).create_commit(
        REPO, [CommitOperationAdd("export.json", b"{}")], commit_message="Export", create_pr=True
    )
    result = published(lfs_hub, export(tmp_path / "new", release(2)), create_pr=True)
    assert result.pr_url is not None and result.pr_url.endswith("/3")


def test_a_hub_without_xet_is_served_over_lfs_and_the_user_is_told(lfs_hub: RehearsalHub, tmp_path: Path) -> None:
    notes: list[str] = []
    Push(connected(lfs_hub), note=notes.append).commit(export(tmp_path, release()))
    assert any("LFS" in note for note in notes)


def test_progress_counts_every_byte_that_is_sent(lfs_hub: RehearsalHub, tmp_path: Path) -> None:
    sizes: list[int] = []
    result = Push(connected(lfs_hub)).commit(export(tmp_path, release()), sizes.append)
    assert sum(sizes) == result.uploaded_bytes


def test_the_client_shows_no_bars_or_log_lines_of_its_own(
    hub: RehearsalHub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    published(hub, export(tmp_path, release()))
    assert capfd.readouterr() == ("", "")


def test_weights_are_not_read_again_to_hash_them(
    hub: RehearsalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hashed(*args: object) -> bytes:
        raise AssertionError("a file was hashed by the client")

    monkeypatch.setattr("huggingface_hub.lfs.sha_fileobj", hashed)
    published(hub, export(tmp_path, release()))


def test_a_file_that_the_repositorys_gitignore_names_is_published_all_the_same(
    lfs_hub: RehearsalHub, tmp_path: Path
) -> None:
    api_of(lfs_hub).create_repo(REPO)
    commit_by_somebody_else(lfs_hub, {".gitignore": b"*.json\n*.safetensors\n"})
    files = export(tmp_path, release())
    published(lfs_hub, files)
    assert {file.path for file in files} <= tree(lfs_hub)


def test_a_file_that_changed_its_size_is_not_sent(lfs_hub: RehearsalHub, tmp_path: Path) -> None:
    files = export(tmp_path, release())
    files[3].source.write_bytes(b"other")
    with pytest.raises(OutputError, match="has 5 bytes, expected 200080 bytes"):
        published(lfs_hub, files)
    assert len(commits(lfs_hub)) == 1


# Answers that are lost, and bytes that are


def losing_the_answer(monkeypatch: pytest.MonkeyPatch, method: str, *, before: int = 0) -> list[str]:
    """Makes a method of the client lose its answer: ``before`` times before the Hub hears of it, then once after."""
    real: Call = getattr(HfApi, method)
    tries: list[str] = []

    def lossy(*args: Any, **kwargs: Any) -> Any:
        tries.append(method)
        if len(tries) <= before:
            raise httpx.ConnectError("connection reset")
        answer = real(*args, **kwargs)
        if len(tries) == before + 1:
            raise httpx.ReadTimeout("timed out")
        return answer

    monkeypatch.setattr(HfApi, method, lossy)
    return tries


@pytest.mark.parametrize("create_pr", [False, True])
def test_a_commit_whose_answer_is_lost_is_found_and_not_made_twice(
    lfs_hub: RehearsalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, create_pr: bool
) -> None:
    published(lfs_hub, export(tmp_path / "old", release(1)))
    tries = losing_the_answer(monkeypatch, "create_commit", before=2)
    result = published(lfs_hub, export(tmp_path / "new", release(2)), create_pr=create_pr)
    assert (result.status, len(tries)) == ("published", 3)
    revision = "refs/pr/1" if create_pr else "main"
    assert commits(lfs_hub, revision)[0] == result.commit
    assert len(commits(lfs_hub, revision)) == 3
    assert (result.pr_url is not None) == create_pr


@pytest.mark.parametrize("method", ["create_repo", "create_branch", "create_tag"])
def test_a_lost_answer_to_any_other_change_is_no_failure(
    lfs_hub: RehearsalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    tries = losing_the_answer(monkeypatch, method)
    result = published(lfs_hub, export(tmp_path, release()), revision="dev", release_tag="v1")
    refs = api_of(lfs_hub).list_repo_refs(REPO)
    assert [(tag.name, tag.target_commit) for tag in refs.tags] == [("v1", result.commit)]
    assert (tries, len(commits(lfs_hub, "dev"))) == ([method], 2)


def test_a_commit_by_somebody_else_is_not_taken_for_the_lost_one(
    lfs_hub: RehearsalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published(lfs_hub, export(tmp_path / "old", release(1)))
    connection = connected(lfs_hub)
    real: Call = HfApi.create_commit

    def overtaken(api: HfApi, *args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(HfApi, "create_commit", real)
        commit_by_somebody_else(lfs_hub, {"notes.md": b"n"})
        raise httpx.ReadTimeout("timed out")

    monkeypatch.setattr(HfApi, "create_commit", overtaken)
    with pytest.raises(HubRefusedError):
        Push(connection).commit(export(tmp_path / "new", release(2)))
    assert len(commits(lfs_hub)) == 3


def test_other_bytes_than_were_sent_are_found_and_not_tagged(
    hub: RehearsalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Call = HfApi.create_commit

    def corrupting(api: HfApi, repo_id: str, operations: list[Any], **kwargs: Any) -> Any:
        operations = [
            CommitOperationAdd("config.json", b"[]") if operation.path_in_repo == "config.json" else operation
            for operation in operations
        ]
        return real(api, repo_id, operations, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", corrupting)
    with pytest.raises(VerificationError, match=r"config\.json") as caught:
        published(hub, export(tmp_path, release()), release_tag="v1")
    assert "revert" in caught.value.hint
    assert api_of(hub).list_repo_refs(REPO).tags == []


def test_a_file_that_did_not_leave_is_found(
    lfs_hub: RehearsalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published(lfs_hub, export(tmp_path / "old", release(1, shards=3)))
    real: Call = HfApi.create_commit

    def forgetful(api: HfApi, repo_id: str, operations: list[Any], **kwargs: Any) -> Any:
        kept = [operation for operation in operations if not isinstance(operation, CommitOperationDelete)]
        return real(api, repo_id, kept, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", forgetful)
    with pytest.raises(VerificationError, match="of-00003"):
        published(lfs_hub, export(tmp_path / "new", release(2, shards=1)))


# A published revision, proven without its weights


def with_index(shards: dict[str, bytes], weight_map: dict[str, str]) -> dict[str, bytes]:
    return {**shards, "model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode()}


@pytest.fixture
def as_the_hub(hub: RehearsalHub, monkeypatch: pytest.MonkeyPatch) -> RehearsalHub:
    """The rehearsal Hub as the one that huggingface_hub talks to."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    return hub


PLACES = {f"weight{i}": f"model-{i:05}-of-00002.safetensors" for i in (1, 2)}


def test_a_published_export_is_proven_without_its_weights(as_the_hub: RehearsalHub, tmp_path: Path) -> None:
    result = published(as_the_hub, export(tmp_path, with_index(release(), PLACES)), release_tag="v1")
    commit_by_somebody_else(as_the_hub, {"LICENSE": b"free"})
    for revision, commit in (("v1", result.commit), ("main", commits(as_the_hub)[0])):
        as_the_hub.requests.clear()
        proven = prove_published(REPO, revision)
        assert (proven.commit, len(proven.paths)) == (commit, 6)
        assert changes(as_the_hub) == []


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        ({"config.json": b"[]"}, "config.json is not what was exported"),
        ({"model-00001-of-00002.safetensors": b"0" * 200_080}, "of another digest"),
        ({"pytorch_model.bin": b"0"}, "pytorch_model.bin is not what was exported: found 1 bytes"),
    ],
)
def test_a_repository_that_somebody_changed_is_not_proven(
    files: dict[str, bytes], fault: str, as_the_hub: RehearsalHub, tmp_path: Path
) -> None:
    published(as_the_hub, export(tmp_path, release()))
    commit_by_somebody_else(as_the_hub, files)
    with pytest.raises(VerificationError, match=fault):
        prove_published(REPO, "main")


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        (with_index(release(), PLACES | {"weight2": PLACES["weight1"]}), "do not name the same tensors"),
        (with_index(release(), PLACES | {"weight3": PLACES["weight1"]}), "do not name the same tensors"),
        (release() | {"model-00002-of-00002.safetensors": b"0" * 200_000}, "header of model-00002"),
        (release() | {"model-00002-of-00002.safetensors": safetensors({"a": b"0" * 9})[:-1]}, "header of model-00002"),
    ],
)
def test_weights_whose_headers_do_not_fit_are_found_after_the_commit(
    files: dict[str, bytes], fault: str, lfs_hub: RehearsalHub, tmp_path: Path
) -> None:
    with pytest.raises(VerificationError, match=fault):
        published(lfs_hub, export(tmp_path, files), release_tag="v1")
    assert api_of(lfs_hub).list_repo_refs(REPO).tags == []


def test_a_long_header_is_read_whole(as_the_hub: RehearsalHub, tmp_path: Path) -> None:
    weights = safetensors({f"weight.{'x' * 100}.{i}": bytes([i % 256]) for i in range(2000)})
    published(as_the_hub, export(tmp_path, {"README.md": CARD.encode(), "model.safetensors": weights}))
    assert len(prove_published(REPO, "main").paths) == 2


@pytest.mark.parametrize("name", ["org/none", "org/tiny@none"])
def test_what_is_not_there_cannot_be_proven(name: str, as_the_hub: RehearsalHub, tmp_path: Path) -> None:
    published(as_the_hub, export(tmp_path, release()))
    repo_id, _, revision = name.partition("@")
    with pytest.raises(UsageError, match=f"There is no {repo_id}@{revision or 'main'}"):
        prove_published(repo_id, revision or "main")


# A plan before the weights are written


def test_a_forecast_tells_what_is_known_before_the_weights_are(lfs_hub: RehearsalHub, tmp_path: Path) -> None:
    published(lfs_hub, export(tmp_path, release(1, shards=3)))
    commit_by_somebody_else(lfs_hub, {"LICENSE": b"free"})
    texts = {"README.md": CARD.encode(), "config.json": b"[]", "vocab.json": b"new"}
    size = len(release()["model-00001-of-00002.safetensors"])
    sizes = {"model-00001-of-00003.safetensors": size, "model-00002-of-00003.safetensors": 5, "export.json": 0}
    lfs_hub.requests.clear()
    forecast = connected(lfs_hub).forecast(texts, sizes)
    assert forecast == Forecast(
        added=("vocab.json",),
        replaced=("config.json", "export.json", "model-00002-of-00003.safetensors"),
        undecided=("model-00001-of-00003.safetensors",),
        deleted=("model-00003-of-00003.safetensors", "tokenizer.json"),
        kept=(".gitattributes", "LICENSE"),
        unchanged=("README.md",),
        sent_bytes=size + 5 + 3 + 2,
    )
    assert changes(lfs_hub) == []


@pytest.mark.parametrize("size", ["1e999", '"a"', "null", "[]"])
def test_a_manifest_on_the_hub_that_is_not_ours_names_no_files(size: str) -> None:
    assert manifest_files(b'{"files": [{"path": "a", "size": %s, "sha256": "b"}]}' % size.encode()) == {}


# What is sent while others are still to come


def test_files_that_went_ahead_are_not_sent_again_and_may_go_away(hub: RehearsalHub, tmp_path: Path) -> None:
    files = export(tmp_path, release())
    push = Push(connected(hub))
    weights = [file for file in files if file.path.endswith(".safetensors")]
    for file in weights:
        assert push.send_ahead(file)
        file.source.unlink()
    assert tree(hub) == {".gitattributes"}
    result = push.commit(files)
    assert (result.status, set(result.added)) == ("published", {file.path for file in files})
    assert hub.read(REPO, weights[0].path) == release()[weights[0].path]
    assert len(commits(hub)) == 2

    (tmp_path / weights[0].path).write_bytes(release()[weights[0].path])
    again = Push(connected(hub))
    hub.requests.clear()
    assert again.send_ahead(weights[0])
    assert again.commit(files).status == "unchanged"
    assert changes(hub) == []


def test_nothing_goes_ahead_while_the_release_tag_is_in_doubt(lfs_hub: RehearsalHub, tmp_path: Path) -> None:
    published(lfs_hub, export(tmp_path / "old", release()), release_tag="v1")
    push = Push(connected(lfs_hub, release_tag="v1"))
    files = export(tmp_path / "new", release(2))
    lfs_hub.requests.clear()
    assert not push.send_ahead(files[-1])
    assert changes(lfs_hub) == []


# What is refused before a weight is read


def test_an_invalid_card_is_refused_and_nothing_is_made(lfs_hub: RehearsalHub) -> None:
    with pytest.raises(HubRefusedError, match=r"README\.md"):
        connect(Destination(REPO), token=lfs_hub.token, endpoint=lfs_hub.endpoint, card="---\nlicense: [1, {]\n---\n")
    assert changes(lfs_hub) == []


def test_no_token_is_a_credential_error(lfs_hub: RehearsalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(CredentialError, match="there is none"):
        connect(Destination(REPO), endpoint=lfs_hub.endpoint)
    assert lfs_hub.requests == []


def test_the_token_of_the_environment_is_used(lfs_hub: RehearsalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", lfs_hub.token)
    assert connect(Destination(REPO), endpoint=lfs_hub.endpoint).user == "rehearsal"


@pytest.mark.parametrize("token", ["hf_wrong", "hf_two words", "hf_line\nbreak", "hf_ümlaut"])
def test_a_bad_token_is_a_credential_error_and_is_not_shown(lfs_hub: RehearsalHub, token: str) -> None:
    with pytest.raises(CredentialError) as caught:
        connected(lfs_hub, token)
    assert token not in "".join(traceback.format_exception(caught.value))
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    "rights",
    [
        {"role": "read"},
        {"expired": True},
        {"role": "fineGrained"},
        {"role": "fineGrained", "scopes": ["elsewhere", "org/other"]},
        {"user": "stranger", "role": "fineGrained", "scopes": ["stranger"]},
    ],
)
def test_a_token_without_the_right_is_a_credential_error_before_anything_is_made(
    lfs_hub: RehearsalHub, rights: dict[str, Any]
) -> None:
    with pytest.raises(CredentialError):
        connected(lfs_hub, lfs_hub.add_token(**rights))
    assert changes(lfs_hub) == []


@pytest.mark.parametrize("scope", ["org", REPO])
def test_a_fine_grained_token_for_the_place_is_enough(lfs_hub: RehearsalHub, tmp_path: Path, scope: str) -> None:
    token = lfs_hub.add_token(role="fineGrained", scopes=[scope])
    assert Push(connected(lfs_hub, token)).commit(export(tmp_path, release())).status == "published"


def test_a_stranger_to_the_namespace_may_not_publish_there_but_may_propose() -> None:
    account = {"name": "somebody", "orgs": [{"name": "elsewhere"}], "auth": {"accessToken": {"role": "write"}}}
    with pytest.raises(CredentialError, match="not a member of org"):
        require_write_access(account, Destination(REPO))
    require_write_access(account, Destination(REPO, create_pr=True))
    require_write_access({**account, "orgs": [{"name": "Org", "roleInOrg": "write"}]}, Destination(REPO))
    with pytest.raises(CredentialError, match="may only read in org"):
        require_write_access({**account, "orgs": [{"name": "org", "roleInOrg": "read"}]}, Destination(REPO))


def test_a_refusal_is_not_asked_for_twice(lfs_hub: RehearsalHub) -> None:
    with pytest.raises(CredentialError):
        connected(lfs_hub, lfs_hub.add_token(expired=True))
    assert lfs_hub.requests == [("GET", "/api/whoami-v2")]


def test_a_visibility_that_cannot_be_had_is_told(lfs_hub: RehearsalHub) -> None:
    api_of(lfs_hub).create_repo(REPO, private=False)
    notes: list[str] = []
    connect(Destination(REPO), token=lfs_hub.token, endpoint=lfs_hub.endpoint, note=notes.append)
    assert notes == [f"{REPO} is public already and stays so."]


# A Hub that does not answer, and what is told


def test_a_refused_connection_is_unreachable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(HubUnreachableError, match="accept the token"):
        connect(Destination(REPO), token="hf_secret", endpoint=f"http://127.0.0.1:{port}")


def test_a_hub_that_takes_the_connection_and_says_nothing_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exporter.hub.patience.READ_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(HubUnreachableError):
        connect(Destination(REPO), token="hf_secret", endpoint=f"http://127.0.0.1:{listener.getsockname()[1]}")


def test_a_busy_hub_is_asked_again(lfs_hub: RehearsalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Call = HfApi.whoami
    tries = []

    def busy(api: HfApi) -> Any:
        tries.append(api)
        if len(tries) < 3:
            answer = httpx.Response(503, request=httpx.Request("GET", lfs_hub.endpoint))
            raise httpx.HTTPStatusError("busy", request=answer.request, response=answer)
        return real(api)

    monkeypatch.setattr(HfApi, "whoami", busy)
    assert connected(lfs_hub).user == "rehearsal"
    assert len(tries) == 3


@pytest.mark.parametrize(("method", "tries"), [("POST", 3), ("GET", 2)])
def test_a_request_that_stays_unanswered_is_given_up_after_a_minute(
    monkeypatch: pytest.MonkeyPatch, method: str, tries: int
) -> None:
    clock = iter([0.0, 0.0, 31.0, 31.0, 62.0, 62.0, 93.0, 93.0])
    monkeypatch.setattr("exporter.hub.patience.time.monotonic", lambda: next(clock))
    patience = Patience(httpx.Client)
    request = httpx.Request(method, "http://hub/api/models/org/tiny/preupload/main")
    for _ in range(tries):
        patience.before_request(request)
    with pytest.raises(HubUnreachableError, match=f"{tries} times in {31 * tries} s"):
        patience.before_request(request)


def test_an_answered_request_may_be_sent_any_number_of_times() -> None:
    patience = Patience(httpx.Client)
    request = httpx.Request("GET", "http://hub/api")
    for _ in range(10):
        patience.before_request(request)
        patience.after_response(httpx.Response(503, request=request))
    assert patience._unanswered == {}


def test_every_request_of_a_release_has_a_time_limit(
    hub: RehearsalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: dict[str, dict[str, float | None]] = {}
    real: Call = httpx.HTTPTransport.handle_request

    def noting(transport: Any, request: Any) -> Any:
        limits[f"{request.method} {request.url.path}"] = dict(request.extensions["timeout"])
        return real(transport, request)

    monkeypatch.setattr(httpx.HTTPTransport, "handle_request", noting)
    published(hub, export(tmp_path, release()), release_tag="v1")
    assert len(limits) > 8
    assert {path: limit for path, limit in limits.items() if None in limit.values()} == {}


@pytest.mark.parametrize(
    ("status", "headers", "pause"),
    [
        (429, {"Retry-After": "7"}, 7.0),
        (429, {"ratelimit": '"api";r=0;t=55'}, 55.0),
        (503, {"Retry-After": "3"}, 3.0),
        (503, {}, None),
        (200, {"Retry-After": "7"}, None),
    ],
)
def test_the_pause_that_a_busy_hub_asks_for_is_read(status: int, headers: dict[str, str], pause: float | None) -> None:
    assert requested_pause(httpx.Response(status, headers=headers)) == pause


def test_a_pause_of_an_hour_is_not_waited_for() -> None:
    answer = httpx.Response(429, headers={"Retry-After": "3600"}, request=httpx.Request("GET", "http://hub/api"))
    with pytest.raises(HubUnreachableError, match="3600 s"):
        Patience(httpx.Client).after_response(answer)


@pytest.mark.parametrize(
    ("status", "answer", "kind"),
    [
        (400, "bad", HubRefusedError),
        (401, "Invalid credentials in Authorization header", CredentialError),
        (403, "no rights", CredentialError),
        (403, "Private repository storage limit reached", HubRefusedError),
        (404, "gone", HubRefusedError),
        (409, "there already", HubRefusedError),
        (412, "stale", HubRefusedError),
        (413, "too large", HubRefusedError),
        (429, "slow down", HubUnreachableError),
        (500, "oops", HubUnreachableError),
        (504, "timeout", HubUnreachableError),
    ],
)
def test_every_refusal_is_one_line_with_the_hubs_words_and_without_the_token(
    status: int, answer: str, kind: type[ExportError]
) -> None:
    from huggingface_hub.utils import hf_raise_for_status

    request = httpx.Request("POST", "http://hub/api/models/org/tiny/commit/main")
    body = {"error": f"{answer}\nfor hf_secret"}
    with pytest.raises(httpx.HTTPError) as raised:
        hf_raise_for_status(httpx.Response(status, json=body, request=request))
    told = translate(raised.value, "make the commit", "hf_secret")
    assert type(told) is kind
    assert f"status {status}, {answer} for <auth_token>" in told.message
    assert "\n" not in told.message + told.hint and "hf_secret" not in told.message


def test_an_error_whose_text_holds_the_token_is_not_chained(
    lfs_hub: RehearsalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leaking(api: HfApi) -> Any:
        raise ValueError(f"Illegal header value {lfs_hub.token}")

    monkeypatch.setattr(HfApi, "whoami", leaking)
    with pytest.raises(HubRefusedError) as caught:
        connected(lfs_hub)
    assert lfs_hub.token not in "".join(traceback.format_exception(caught.value))


def test_no_value_shows_the_token(lfs_hub: RehearsalHub, tmp_path: Path) -> None:
    connection = connected(lfs_hub)
    result = Push(connection).commit(export(tmp_path, release()))
    assert lfs_hub.token not in repr(connection) + repr(result) + repr(replace(connection, exists=False))
