"""The rehearsal Hub, asked by the real huggingface_hub client over both of its transports."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import hf_xet
import pytest
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile, RepoFolder
from huggingface_hub.utils import build_hf_headers, disable_progress_bars, get_session

from exporter.errors import UsageError
from exporter.rehearsal import RehearsalHub

REPO = "Lab/model"
CARD = b"---\nlicense: apache-2.0\n---\n# A model\n"
disable_progress_bars()


@pytest.fixture(params=["xet", "lfs"])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", request.param == "lfs")
    return str(request.param)


@pytest.fixture
def over_lfs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


@pytest.fixture(scope="module")
def running_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RehearsalHub]:
    with RehearsalHub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture
def hub(running_hub: RehearsalHub) -> RehearsalHub:
    running_hub.repositories.clear()
    running_hub.requests.clear()
    return running_hub


@pytest.fixture
def api(hub: RehearsalHub) -> HfApi:
    client = HfApi(endpoint=hub.endpoint, token=hub.token)
    client.create_repo(REPO, private=True)
    return client


@pytest.fixture
def weights(request: pytest.FixtureRequest) -> bytes:
    """More than two parts of a multi-part upload; no two tests have the same."""
    return random.Random(request.node.name).randbytes(11_000_000)


def push(api: HfApi, files: Mapping[str, bytes], delete: tuple[str, ...] = (), **options: object) -> CommitInfo:
    operations = [
        *(CommitOperationAdd(path, data) for path, data in files.items()),
        *map(CommitOperationDelete, delete),
    ]
    return api.create_commit(REPO, operations, **{"commit_message": "A release", **options})


def listing(api: HfApi, revision: str = "main") -> dict[str, RepoFile]:
    entries = api.list_repo_tree(REPO, recursive=True, revision=revision)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def post(hub: RehearsalHub, path: str, lines: list[object]) -> int:
    body = "\n".join(map(json.dumps, lines))
    headers = build_hf_headers(token=hub.token)
    return int(get_session().post(f"{hub.endpoint}{path}", content=body, headers=headers).status_code)


# Push and read back


def test_what_was_pushed_comes_back_bit_for_bit(
    api: HfApi, hub: RehearsalHub, transport: str, tmp_path: Path, weights: bytes
) -> None:
    files = {"model.safetensors": weights, "small.bin": b"x" * 100, "README.md": CARD, "code/a model.py": b"pass\n"}
    push(api, files)
    folder = Path(api.snapshot_download(REPO, cache_dir=tmp_path / "cache"))
    assert {path: (folder / path).read_bytes() for path in files} == files
    assert {path: hub.read(REPO, path) for path in files} == files
    used = {"xet": "xet-write-token", "lfs": "info/lfs/objects/batch"}
    assert [name for name, part in used.items() if any(part in path for _, path in hub.requests)] == [transport]


def test_sizes_and_digests_are_those_of_the_bytes(api: HfApi, transport: str, weights: bytes) -> None:
    push(api, {"model.safetensors": weights, "README.md": CARD})
    sha256 = hashlib.sha256(weights).hexdigest()
    card_oid = hashlib.sha1(b"blob %d\0" % len(CARD) + CARD).hexdigest()
    tree = listing(api)
    assert tree["model.safetensors"].lfs is not None and tree["README.md"].lfs is None
    assert (tree["model.safetensors"].size, tree["model.safetensors"].lfs.sha256) == (len(weights), sha256)
    assert (tree["README.md"].size, tree["README.md"].blob_id) == (len(CARD), card_oid)
    assert (tree["model.safetensors"].xet_hash is not None) == (transport == "xet")
    found = {row.rfilename: row for row in api.model_info(REPO, files_metadata=True).siblings or []}
    assert found["model.safetensors"].lfs is not None
    assert (found["model.safetensors"].lfs.sha256, found["README.md"].blob_id) == (sha256, card_oid)
    assert [row.path for row in api.get_paths_info(REPO, ["README.md", "absent"])] == ["README.md"]


def test_a_part_of_a_file_can_be_read(api: HfApi, hub: RehearsalHub, transport: str, weights: bytes) -> None:
    push(api, {"model.safetensors": weights, "README.md": CARD})
    for path, data in {"model.safetensors": weights, "README.md": CARD}.items():
        headers = {**build_hf_headers(token=hub.token), "Range": "bytes=5-24"}
        url = f"{hub.endpoint}/{REPO}/resolve/main/{path}"
        answer = get_session().get(url, headers=headers, follow_redirects=True)
        assert (answer.status_code, answer.content) == (206, data[5:25])


def test_a_client_without_xet_reads_what_came_over_xet(
    api: HfApi, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, weights: bytes
) -> None:
    push(api, {"model.safetensors": weights})
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    assert Path(api.hf_hub_download(REPO, "model.safetensors", cache_dir=tmp_path)).read_bytes() == weights


def test_another_process_reads_over_xet_while_an_upload_goes_on(
    api: HfApi, hub: RehearsalHub, tmp_path: Path, weights: bytes
) -> None:
    push(api, {"model.safetensors": weights})
    program = (
        "import sys; from huggingface_hub import HfApi;"
        "print(HfApi(sys.argv[1], token=sys.argv[2]).hf_hub_download(sys.argv[3], 'model.safetensors'))"
    )
    arguments = [sys.executable, "-c", program, hub.endpoint, hub.token, REPO]
    headers, url = build_hf_headers(token=hub.token), f"{hub.endpoint}/api/models/{REPO}/xet-write-token/main"
    with hf_xet.XetSession().new_upload_commit(token_refresh_url=url, token_refresh_headers=headers) as commit:
        commit.start_upload_bytes(weights[:1000], sha256=hf_xet.COMPUTE_SHA256)
        environment = {**os.environ, "HF_HOME": str(tmp_path)}
        child = subprocess.run(arguments, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    assert Path(child.stdout.strip()).read_bytes() == weights
    assert not [path for _, path in hub.requests if path.startswith("/storage/")]


def test_a_false_digest_is_found_when_the_file_is_read(
    api: HfApi, hub: RehearsalHub, tmp_path: Path, weights: bytes
) -> None:
    operation = CommitOperationAdd("model.safetensors", b"other weights")
    operation.upload_info.sha256 = hashlib.sha256(weights).digest()
    api.create_commit(REPO, [operation], commit_message="A lie")
    answer = get_session().get(
        f"{hub.endpoint}/{REPO}/resolve/main/model.safetensors",
        headers=build_hf_headers(token=hub.token),
        follow_redirects=True,
    )
    assert answer.status_code == 400


def test_a_hub_without_xet_fails_a_client_that_insists(tmp_path: Path) -> None:
    with RehearsalHub(tmp_path, xet=False) as hub:
        api = HfApi(endpoint=hub.endpoint, token=hub.token)
        api.create_repo(REPO)
        with pytest.raises(ConnectionError):
            push(api, {"model.safetensors": b"weights"})
    assert [path for _, path in hub.requests if "xet-write-token" in path]


def test_a_listing_of_thousands_of_files_is_whole(api: HfApi) -> None:
    push(api, {f"data/{number}.txt": b"%d" % number for number in range(2100)})
    assert len(listing(api)) == 2101


# Large files over LFS


def test_a_file_that_is_already_there_is_not_sent_again(
    over_lfs: None, api: HfApi, hub: RehearsalHub, weights: bytes
) -> None:
    operation = CommitOperationAdd("model.safetensors", weights)
    api.preupload_lfs_files(REPO, [operation])
    assert list(listing(api)) == [".gitattributes"]
    hub.requests.clear()
    push(api, {"model.safetensors": weights, "copy.safetensors": weights})
    assert [method for method, _ in hub.requests] == ["POST"] * 3
    assert hub.read(REPO, "copy.safetensors") == weights


def test_other_bytes_than_promised_are_refused(over_lfs: None, api: HfApi, hub: RehearsalHub, weights: bytes) -> None:
    operation = CommitOperationAdd("model.safetensors", b"other weights")
    operation.upload_info.sha256 = hashlib.sha256(weights).digest()
    with pytest.raises((RuntimeError, HfHubHTTPError)):
        api.create_commit(REPO, [operation], commit_message="A lie")
    assert len(api.list_repo_commits(REPO)) == 1


def test_an_upload_whose_answers_were_lost_can_be_repeated(api: HfApi, hub: RehearsalHub, weights: bytes) -> None:
    def send(data: bytes) -> list[int]:
        objects = [{"oid": hashlib.sha256(data).hexdigest(), "size": len(data)}]
        batch, headers = f"{hub.endpoint}/{REPO}.git/info/lfs/objects/batch", build_hf_headers(token=hub.token)
        answer = get_session().post(batch, json={"operation": "upload", "objects": objects}, headers=headers).json()
        upload = answer["objects"][0]["actions"]["upload"]
        size = int(upload.get("header", {}).get("chunk_size", len(data)))
        urls = [url for number, url in upload.get("header", {}).items() if number.isdigit()] or [upload["href"]]
        parts = [data[start : start + size] for start in range(0, len(data), size)]
        answers = [
            get_session().put(url, content=part) for url, part in zip(urls, parts, strict=True) for _ in range(2)
        ]
        if len(parts) > 1:
            etags = [{"partNumber": n, "etag": put.headers["ETag"]} for n, put in enumerate(answers[::2], 1)]
            answers += [get_session().post(upload["href"], json={"parts": etags}) for _ in range(2)]
        return [answer.status_code for answer in answers]

    assert send(weights[:100]) == [200] * 2
    assert send(weights) == [200] * 8


def test_a_large_file_decides_by_name_size_and_content(over_lfs: None, api: HfApi) -> None:
    big = b"{" + b" " * 10_000_001 + b"}"
    files = {"tokenizer.json": big, "config.json": b"{}", "a.bin": b"text", "picture": b"\0\1", "vocab.json": b"{}"}
    push(api, files)
    tree = listing(api)
    assert {path for path in files if tree[path].lfs} == {"tokenizer.json", "a.bin", "picture"}


def test_a_large_file_that_no_pattern_covers_gets_one(over_lfs: None, api: HfApi, hub: RehearsalHub) -> None:
    before = hub.read(REPO, ".gitattributes")
    push(api, {"picture": b"\0\1", "a.bin": b"covered"})
    assert hub.read(REPO, ".gitattributes") == before + b"picture filter=lfs diff=lfs merge=lfs -text\n"


def test_a_file_in_gitignore_stays_out_of_the_commit(api: HfApi) -> None:
    push(api, {".gitignore": b"*.log\n"})
    push(api, {"run.log": b"", "config.json": b"{}"})
    assert list(listing(api)) == [".gitattributes", ".gitignore", "config.json"]


# Commits


def test_a_push_is_one_commit(api: HfApi, hub: RehearsalHub, transport: str) -> None:
    push(api, {"a.txt": b"a", "b.bin": b"b"}, commit_message="Title", commit_description="Body")
    newest, first = api.list_repo_commits(REPO)
    assert (newest.title, newest.message, newest.authors) == ("Title", "Body", ["rehearsal"])
    assert first.title == "initial commit"
    assert [commit.oid for commit in hub.repositories[REPO].history()] == [newest.commit_id, first.commit_id]


def test_additions_and_deletions_are_one_commit(api: HfApi) -> None:
    push(api, {"old.txt": b"", "shards/1.bin": b"1", "shards/2.bin": b"2", "LICENSE": b"MIT"})
    push(api, {"new.txt": b""}, delete=("old.txt", "shards/"))
    assert sorted(listing(api)) == [".gitattributes", "LICENSE", "new.txt"]
    assert len(api.list_repo_commits(REPO)) == 3


def test_deleting_what_is_not_there_changes_nothing(api: HfApi) -> None:
    with pytest.raises(EntryNotFoundError):
        push(api, {"new.txt": b""}, delete=("absent.txt",))
    assert list(listing(api)) == [".gitattributes"]


def test_the_same_files_again_are_no_commit(api: HfApi, transport: str, weights: bytes) -> None:
    first = push(api, {"model.safetensors": weights, "README.md": CARD})
    assert push(api, {"model.safetensors": weights, "README.md": CARD}).oid == first.oid


def test_a_stale_parent_is_refused(api: HfApi, transport: str) -> None:
    head = api.model_info(REPO).sha
    push(api, {"theirs.txt": b""}, parent_commit=head)
    with pytest.raises(HfHubHTTPError) as error:
        push(api, {"model.safetensors": b"ours"}, parent_commit=head)
    assert error.value.response.status_code == 412
    assert list(listing(api)) == [".gitattributes", "theirs.txt"]


def test_an_unknown_large_file_or_a_bad_card_is_no_commit(api: HfApi, hub: RehearsalHub, weights: bytes) -> None:
    push(api, {"model.safetensors": weights})
    known = hashlib.sha256(weights).hexdigest()
    header = {"key": "header", "value": {"summary": "s", "description": ""}}
    unknown = {"key": "lfsFile", "value": {"path": "a.bin", "algo": "sha256", "oid": "0" * 64, "size": len(weights)}}
    shorter = {"key": "lfsFile", "value": {"path": "a.bin", "algo": "sha256", "oid": known, "size": 1}}
    content = base64.b64encode(b"---\nlicense: mine\n---\n").decode()
    card = {"key": "file", "value": {"path": "README.md", "content": content, "encoding": "base64"}}
    for operation in (unknown, shorter, card):
        assert post(hub, f"/api/models/{REPO}/commit/main", [header, operation]) == 400
    assert len(api.list_repo_commits(REPO)) == 2


def test_object_ids_are_those_of_git(over_lfs: None, api: HfApi, hub: RehearsalHub, tmp_path: Path) -> None:
    push(api, {"a.txt": b"a", "a/b/c.txt": b"c", "a-b/model.bin": b"weights"}, commit_description="why")
    commit, first = hub.repositories[REPO].history()
    sha256 = hashlib.sha256(b"weights").hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize 7\n".encode()
    attributes = hub.read(REPO, ".gitattributes")
    files = {".gitattributes": attributes, "a.txt": b"a", "a/b/c.txt": b"c", "a-b/model.bin": pointer}

    def git(*arguments: str, stdin: bytes = b"") -> str:
        environment = {"PATH": os.environ["PATH"], "GIT_CONFIG_NOSYSTEM": "1", "HOME": str(tmp_path)}
        command = ["git", *arguments]
        answer = subprocess.run(command, cwd=tmp_path, env=environment, input=stdin, stdout=subprocess.PIPE, check=True)
        return answer.stdout.decode().strip()

    git("init", "-q")
    for path, data in files.items():
        blob = git("hash-object", "-w", "--stdin", stdin=data)
        git("update-index", "--add", "--cacheinfo", f"100644,{blob},{path}")
    tree = git("write-tree")
    entries = api.list_repo_tree(REPO, recursive=True)
    folders = {entry.path: entry.tree_id for entry in entries if isinstance(entry, RepoFolder)}
    assert folders == {path: git("rev-parse", f"{tree}:{path}") for path in ("a", "a/b", "a-b")}
    person = f"rehearsal <rehearsal@users.noreply> {int(commit.date.timestamp())} +0000"
    text = f"tree {tree}\nparent {first.oid}\nauthor {person}\ncommitter {person}\n\nA release\n\nwhy"
    assert commit.oid == git("hash-object", "-t", "commit", "--stdin", stdin=text.encode())
    assert first.tree[".gitattributes"].oid == "a6344aac8c09253b3b630fb776ae94478aa0275b"


# Branches, tags and pull requests


def test_a_branch_and_a_tag_can_be_made_once_and_deleted(api: HfApi) -> None:
    head = push(api, {"a.txt": b"a"}).oid
    api.create_branch(REPO, branch="feature/x")
    api.create_tag(REPO, tag="v1.0", revision=head)
    for make in (lambda: api.create_branch(REPO, branch="feature/x"), lambda: api.create_tag(REPO, tag="v1.0")):
        with pytest.raises(HfHubHTTPError) as error:
            make()
        assert error.value.response.status_code == 409
    push(api, {"a.txt": b"b"}, revision="feature/x")
    refs = api.list_repo_refs(REPO)
    assert [(tag.name, tag.ref, tag.target_commit) for tag in refs.tags] == [("v1.0", "refs/tags/v1.0", head)]
    assert {branch.name for branch in refs.branches} == {"main", "feature/x"}
    assert api.model_info(REPO).sha == api.model_info(REPO, revision="v1.0").sha == head
    assert api.model_info(REPO, revision="feature/x").sha != head
    api.delete_tag(REPO, tag="v1.0")
    api.delete_branch(REPO, branch="feature/x")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision="v1.0")
    with pytest.raises(RevisionNotFoundError):
        api.delete_tag(REPO, tag="v1.0")


def test_a_pull_request_leaves_main_alone(api: HfApi, hub: RehearsalHub, transport: str, weights: bytes) -> None:
    head = api.model_info(REPO).sha
    info = push(api, {"model.safetensors": weights}, create_pr=True, commit_message="Please")
    assert (info.pr_num, info.pr_revision) == (1, "refs/pr/1")
    assert api.model_info(REPO).sha == head
    assert hub.read(REPO, "model.safetensors", "refs/pr/1") == weights
    (found,) = api.get_repo_discussions(
        REPO, discussion_type="pull_request", discussion_status="open", author="rehearsal"
    )
    assert (found.title, found.num, found.status, found.is_pull_request) == ("Please", 1, "open", True)
    push(api, {"config.json": b"{}"}, revision="refs/pr/1")
    details = api.get_discussion_details(REPO, 1)
    assert details.target_branch == "refs/heads/main"
    assert [event.type for event in details.events] == ["comment", "commit", "commit"]
    assert [ref.ref for ref in api.list_repo_refs(REPO, include_pull_requests=True).pull_requests or []] == [
        "refs/pr/1"
    ]


def test_a_pull_request_can_be_merged_or_closed(api: HfApi) -> None:
    for number in (1, 2):
        push(api, {f"{number}.txt": b""}, create_pr=True)
    api.merge_pull_request(REPO, 1)
    api.change_discussion_status(REPO, 2, "closed")
    assert "1.txt" in listing(api) and "2.txt" not in listing(api)
    assert [row.status for row in api.get_repo_discussions(REPO, discussion_status="closed")] == ["closed", "merged"]
    assert list(api.get_repo_discussions(REPO, discussion_status="open")) == []


def test_a_pull_request_on_a_branch_that_moved_is_not_merged(api: HfApi) -> None:
    push(api, {"ours.txt": b""}, create_pr=True)
    push(api, {"theirs.txt": b""})
    with pytest.raises(HfHubHTTPError) as error:
        api.merge_pull_request(REPO, 1)
    assert error.value.response.status_code == 409


def test_a_draft_pull_request_is_open(api: HfApi) -> None:
    assert api.create_pull_request(REPO, title="Draft").status == "draft"
    assert [row.num for row in api.get_repo_discussions(REPO, discussion_status="open")] == [1]
    assert list(api.get_repo_discussions(REPO, discussion_type="discussion")) == []


# Who may do what


def test_a_private_repository_is_hidden_from_strangers(api: HfApi, hub: RehearsalHub, tmp_path: Path) -> None:
    push(api, {"a.txt": b"a"})
    stranger = HfApi(endpoint=hub.endpoint, token=False)
    assert api.repo_exists(REPO) and not stranger.repo_exists(REPO)
    with pytest.raises(RepositoryNotFoundError):
        stranger.hf_hub_download(REPO, "a.txt", cache_dir=tmp_path)
    api.create_repo("Lab/public", private=False)
    assert stranger.repo_exists("Lab/public")


def test_a_repository_is_made_once(api: HfApi) -> None:
    with pytest.raises(HfHubHTTPError) as error:
        api.create_repo(REPO)
    assert error.value.response.status_code == 409
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO


def test_whoami_tells_role_and_organizations(tmp_path: Path) -> None:
    with RehearsalHub(tmp_path, organizations=["OpenAssistant"]) as hub:
        answer = HfApi(endpoint=hub.endpoint, token=hub.token).whoami()
    assert (answer["name"], answer["auth"]["accessToken"]["role"]) == ("rehearsal", "write")
    assert [organization["name"] for organization in answer["orgs"]] == ["OpenAssistant"]


@pytest.mark.parametrize(
    ("role", "scopes", "may"),
    [
        ("read", [], False),
        ("fineGrained", [], False),
        ("fineGrained", ["Other"], False),
        ("fineGrained", ["Lab"], True),
        ("fineGrained", [REPO], True),
        ("write", [], True),
    ],
)
def test_rights_are_those_of_the_token(api: HfApi, hub: RehearsalHub, role: str, scopes: list[str], may: bool) -> None:
    user = HfApi(endpoint=hub.endpoint, token=hub.add_token("someone", role=role, scopes=scopes))
    assert user.repo_exists(REPO)
    if may:
        push(user, {"a.txt": b"a"})
        assert api.list_repo_commits(REPO)[0].authors == ["someone"]
    else:
        with pytest.raises(HfHubHTTPError) as error:
            push(user, {"a.txt": b"a"})
        assert error.value.response.status_code == 403


def test_an_expired_and_an_unknown_token_are_refused(api: HfApi, hub: RehearsalHub) -> None:
    for token in (hub.add_token(expired=True), "hf_unknown"):
        with pytest.raises(HfHubHTTPError) as error:
            HfApi(endpoint=hub.endpoint, token=token).whoami()
        assert error.value.response.status_code == 401
    with pytest.raises(RepositoryNotFoundError):
        HfApi(endpoint=hub.endpoint, token=hub.add_token(expired=True)).model_info(REPO)


# Model cards


@pytest.mark.parametrize(
    "field",
    [
        "license: mine",
        "language: English",
        "language: [en, no]",
        "base_model: /home/me/model",
        "base_model: a/b/c",
        "datasets: ['one two']",
        "tags: chat",
        "tags: [1]",
        "pipeline_tag: [text-generation]",
        "license: [unclosed",
        "- a list",
    ],
)
def test_a_bad_front_matter_is_refused(api: HfApi, field: str) -> None:
    with pytest.raises(ValueError, match=r"Invalid metadata in README.md"):
        push(api, {"README.md": f"---\n{field}\n---\n".encode()})


@pytest.mark.parametrize(
    "field",
    [
        "license: other\nlicense_name: mine",
        "language: [en, deu]",
        "base_model: tiiuae/falcon-7b",
        "base_model: [gpt2, a/b]",
        "datasets: [OpenAssistant/oasst1]\ntags: [sft]\npipeline_tag: text-generation\nlibrary_name: transformers",
    ],
)
def test_a_good_front_matter_is_accepted_without_a_warning(api: HfApi, field: str) -> None:
    push(api, {"README.md": f"---\n{field}\n---\n".encode()})
    assert "README.md" in listing(api)


@pytest.mark.parametrize("card", ["# No front matter\n", "---\npipeline_tag: chatting\n---\n"])
def test_a_doubtful_front_matter_is_accepted_with_a_warning(api: HfApi, card: str) -> None:
    with pytest.warns(UserWarning, match="Warnings while validating metadata"):
        push(api, {"README.md": card.encode()})


# The server


def test_every_request_is_listed_with_the_path_as_sent(api: HfApi, hub: RehearsalHub) -> None:
    push(api, {"a.txt": b""}, create_pr=True)
    hub.requests.clear()
    api.model_info(REPO, revision="refs/pr/1")
    assert hub.requests == [("GET", f"/api/models/{REPO}/revision/refs%2Fpr%2F1")]


def test_a_closed_hub_answers_no_more_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with RehearsalHub() as hub:
        api = HfApi(endpoint=hub.endpoint, token=hub.token)
        api.create_repo(REPO)
        assert list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())
    with pytest.raises(Exception, match="Connection refused"):
        api.whoami()


@pytest.mark.parametrize("package", ["starlette", "uvicorn"])
def test_a_missing_package_is_named_with_the_way_to_install_it(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "exporter.rehearsal.api", raising=False)
    with pytest.raises(UsageError, match=package) as error, RehearsalHub():
        pass
    assert "pip install 'export-model[rehearsal]'" in error.value.hint
