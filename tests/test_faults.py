"""A push whose every request meets every fault, and a process that is killed at every request.

After a fault the repository is as before or complete, never in between, as huggingface_hub itself sees it; the exit
code is the documented one; no commit is made twice; and the same push, run again, completes the release.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from safetensors.torch import save

from exporter.errors import CredentialError, ExportError
from exporter.hub import Destination, OutgoingFile, Publication, Push, connect
from exporter.hub.upload import without_xet
from exporter.rehearsal import RehearsalHub
from exporter.rehearsal.faults import (
    ANY,
    Delay,
    Drop,
    Effect,
    Fault,
    Late,
    Meanwhile,
    Silence,
    Status,
    Truncate,
    WrongDigest,
)

ROOT = Path(__file__).parents[1]
CARD = "---\nlibrary_name: transformers\n---\n# A model\n"
COMMIT, XET_TOKEN = "POST */commit/*", "GET */xet-write-token/*"
READING_BACK = ("GET */resolve/*", "GET /storage/*")
REAL_SLEEP = time.sleep


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Nobody waits longer than a hundredth of a second between tries; how long they wanted to wait is listed."""
    wanted: list[float] = []

    def sleep(seconds: float) -> None:
        wanted.append(seconds)
        REAL_SLEEP(min(seconds, 0.01))

    monkeypatch.setattr("time.sleep", sleep)
    return wanted


# A push, and what anybody sees of it

Contents = dict[str, str]
"""The digest of every file of a revision: sha256 of a large one, git blob id of any other."""


@dataclass(frozen=True)
class View:
    """All that the Hub shows of a repository: the commits, newest first, and the files of every branch, tag and pull
    request."""

    commits: dict[str, tuple[str, ...]] = field(default_factory=dict)
    contents: dict[str, Contents] = field(default_factory=dict)
    pull_requests: int = 0


NOTHING = View()


@dataclass(frozen=True)
class Kind:
    """A kind of push: its options, what it commits to, whether an older release is there, and whether its weights are
    sent ahead one by one."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    target: str = "main"
    updates: bool = True
    ahead: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def arguments(self) -> list[str]:
        """The options on a command line."""
        named = ([f"--{name}"] if value is True else [f"--{name}", str(value)] for name, value in self.options.items())
        return [argument for words in named for argument in words]


FIRST = Kind("first", updates=False)
UPDATE = Kind("update")
PULL_REQUEST = Kind("pull-request", {"create_pr": True}, "refs/pr/1")
TAGGED = Kind("tag", {"release_tag": "v1"})
BRANCH_AND_TAG = Kind("first-to-branch-with-tag", {"revision": "dev/x", "release_tag": "v1"}, "dev/x", updates=False)
KINDS = [
    FIRST,
    UPDATE,
    PULL_REQUEST,
    TAGGED,
    BRANCH_AND_TAG,
    Kind("branch", {"revision": "dev/x"}, "dev/x"),
    Kind("ahead", updates=False, ahead=True),
    Kind("pull-request-ahead", {"create_pr": True}, "refs/pr/1", ahead=True),
]


@dataclass(frozen=True)
class Trial:
    """A release on its way to a repository of its own; no two have a large file in common."""

    hub: RehearsalHub
    kind: Kind
    repo_id: str
    folder: Path
    files: list[OutgoingFile]

    @property
    def api(self) -> HfApi:
        return HfApi(endpoint=self.hub.endpoint, token=self.hub.token)

    def run(self, token: str | None = None) -> Publication:
        destination = Destination(self.repo_id, **self.kind.options)
        push = Push(connect(destination, token=token or self.hub.token, endpoint=self.hub.endpoint, card=CARD))
        for file in self.files if self.kind.ahead else ():
            push.send_ahead(file)
        return push.commit(self.files)

    def exit_code(self, token: str | None = None) -> int:
        """The exit code of the push; an error that is no expected failure is not caught."""
        try:
            self.run(token)
        except ExportError as error:
            assert "\n" not in error.message + error.hint and self.hub.token not in error.message
            return error.exit_code
        return 0

    def commit_by_somebody_else(self) -> None:
        branch = "main" if self.kind.target.startswith("refs/") else self.kind.target
        with nullcontext() if self.hub.xet else without_xet():
            operations = [CommitOperationAdd("LICENSE", b"Edited at %d" % time.monotonic_ns())]
            self.api.create_commit(self.repo_id, operations, commit_message="by hand", revision=branch)

    def view(self) -> View:
        try:
            refs = self.api.list_repo_refs(self.repo_id, include_pull_requests=True)
        except RepositoryNotFoundError:
            return NOTHING
        names = [ref.name for ref in (*refs.branches, *refs.tags)] + [ref.ref for ref in refs.pull_requests or []]
        return View(
            {name: self.commits(name) for name in names},
            {name: self.contents(name) for name in names},
            len(list(self.api.get_repo_discussions(self.repo_id))),
        )

    def commits(self, revision: str) -> tuple[str, ...]:
        return tuple(commit.commit_id for commit in self.api.list_repo_commits(self.repo_id, revision=revision))

    def contents(self, revision: str) -> Contents:
        entries = self.api.list_repo_tree(self.repo_id, recursive=True, revision=revision)
        files = [entry for entry in entries if isinstance(entry, RepoFile)]
        return {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in files}

    def others(self, before: View) -> Contents:
        """The files that are not the exporter's."""
        there = before.contents.get("main") or self.contents("main")
        return {path: there[path] for path in (".gitattributes", "LICENSE") if path in there}

    def complete(self, before: View) -> Contents:
        """What the release makes of the repository."""
        return self.others(before) | {
            file.path: file.sha256 if file.path.endswith(".safetensors") else file.git_blob_id() for file in self.files
        }


@pytest.fixture
def prepared(tmp_path: Path) -> Callable[[RehearsalHub, Kind], Trial]:
    """A push that is about to begin; an older release and somebody's file are there, if it updates."""

    def prepare(hub: RehearsalHub, kind: Kind) -> Trial:
        number = len(list(tmp_path.iterdir())) + 1
        repo_id, folder = f"org/{kind}-{number}", tmp_path / f"new-{number}"
        trial = Trial(hub, kind, repo_id, folder, release(folder, repo_id, number, shards=2))
        if kind.updates:
            older = tmp_path / f"old-{number}"
            files = release(older, repo_id, number, shards=3, more={"merges.txt": b"a b"})
            replace(trial, kind=FIRST, files=files).run()
            replace(trial, kind=FIRST).commit_by_somebody_else()
        return trial

    return prepare


def release(
    folder: Path, repo_id: str, number: int, shards: int, more: Mapping[str, bytes] | None = None
) -> list[OutgoingFile]:
    """An exported folder, whose weights only this ``number`` and number of ``shards`` have."""
    weights = {
        f"model-{shard:05}-of-{shards:05}.safetensors": weights_of(f"weight{shard}", (number, shard, shards))
        for shard in range(1, shards + 1)
    }
    config = b'{"number": %d, "shards": %d}' % (number, shards)
    places = {f"weight{shard}": path for shard, path in enumerate(weights, 1)}
    index = json.dumps({"weight_map": places}).encode()
    files = {"README.md": CARD.encode(), "config.json": config, **weights, "model.safetensors.index.json": index}
    files |= more or {}
    listed = [{"path": path, "size": len(data), "sha256": sha256(data)} for path, data in files.items()]
    manifest = json.dumps({"files": listed, "options": {"hf_repo_name": repo_id}}).encode()
    folder.mkdir()
    return [written(folder / path, data) for path, data in {**files, "export.json": manifest}.items()]


def weights_of(name: str, values: tuple[int, ...], times: int = 1000) -> bytes:
    """A weight file with one tensor, of int64 values."""
    return save({name: torch.tensor(values * times)})


def written(path: Path, data: bytes) -> OutgoingFile:
    path.write_bytes(data)
    return OutgoingFile(path.name, path, len(data), sha256(data))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


Prepare = Callable[[RehearsalHub, Kind], Trial]


def require_as_before_or_complete(trial: Trial, before: View, after: View) -> bool:
    """Whether the release is complete; fails where it is half, is there twice, or anything else has changed."""
    if after == NOTHING:
        assert before == NOTHING
        return False
    target = trial.kind.target
    for name in before.commits.keys() - {target}:
        assert (after.commits[name], after.contents[name]) == (before.commits[name], before.contents[name])
    assert after.commits.keys() <= {*before.commits, "main", target, "v1"}
    assert after.pull_requests <= 1
    # A repository that the push creates holds one commit of the Hub itself; a new branch starts where main is.
    base = before.commits.get(target) or before.commits.get("main") or after.commits["main"][-1:]
    found = after.commits.get(target, base)
    if found == base:
        untouched = before.contents.get("main") or trial.others(before)
        assert after.contents.get(target, untouched) == untouched
        assert "v1" not in after.commits
        return False
    assert found[1:] == base
    assert after.contents[target] == trial.complete(before)
    assert after.commits.get("v1", found) == found
    return "release_tag" not in trial.kind.options or "v1" in after.commits


def require_finished_by_another_run(trial: Trial, before: View, token: str | None = None) -> None:
    """The same push again completes the release, in one commit in all; a third time there is nothing to do."""
    assert trial.run(token).status in ("published", "unchanged")
    after = trial.view()
    assert require_as_before_or_complete(trial, before, after)
    cache = trial.folder.parent / "cache"
    folder = Path(trial.api.snapshot_download(trial.repo_id, revision=trial.kind.target, cache_dir=cache))
    assert all((folder / file.path).read_bytes() == file.source.read_bytes() for file in trial.files)
    assert trial.run(token).status == "unchanged"
    assert trial.view() == after


def requests_of(trial: Trial) -> list[str]:
    """The requests of the push when nothing disturbs it."""
    start = len(trial.hub.requests)
    trial.run()
    return [f"{method} {path}" for method, path in trial.hub.requests[start:]]


def number_of(kind: str, requests: list[str]) -> int:
    """Which request, counted from 1, is the first of a kind."""
    return next(number for number, request in enumerate(requests, 1) if fnmatchcase(request, kind))


def may_be_refused(request: str, effect: Effect) -> bool:
    """Whether a push goes on without this request: a Hub may have no Xet storage, and weights that arrived with the
    right digests need not be given back at once."""
    has_no_xet = fnmatchcase(request, XET_TOKEN) and effect == Status(404)
    return has_no_xet or any(fnmatchcase(request, kind) for kind in READING_BACK)


def try_at(trial: Trial, number: int, effect: Effect, codes: set[int], times: int | None = 1) -> None:
    """The request with this number meets ``effect``, and the push ends with one of ``codes``."""
    before = trial.view()
    plan = trial.hub.disturb(Fault(ANY, number, effect, times))
    code = trial.exit_code()
    trial.hub.disturb()
    assert plan.struck, "the push has fewer requests than an undisturbed one"
    request = " ".join(plan.struck[0])
    where = f"{effect} at request {number}, {request}"
    assert code in codes or (code == 0 and may_be_refused(request, effect)), where
    complete = require_as_before_or_complete(trial, before, trial.view())
    assert complete or code, where
    require_finished_by_another_run(trial, before)


RECOVERED: list[Effect] = [
    Drop(carried_out=True),
    Status(503),
    Truncate(),
    Status(429, {"Retry-After": "2"}),
    Drop(),
    Status(504, carried_out=True),
    Status(500),
    Delay(0.05),
]
REFUSED: dict[int, int] = {401: 6, 403: 6, 404: 7, 412: 7, 413: 7}


def test_requests_of_a_push_meet_passing_faults_and_the_push_goes_on(hub: RehearsalHub, prepared: Prepare) -> None:
    kind = UPDATE if hub.xet else PULL_REQUEST
    for number in range(1, len(requests_of(prepared(hub, kind))) + 1, 3):
        try_at(prepared(hub, kind), number, RECOVERED[number // 3 % len(RECOVERED)], {0})


def test_requests_of_a_push_are_refused_and_the_branch_stays_as_it_is(lfs_hub: RehearsalHub, prepared: Prepare) -> None:
    statuses = list(REFUSED)
    for number in range(2, len(requests_of(prepared(lfs_hub, BRANCH_AND_TAG))) + 1, 4):
        status = statuses[number // 4 % len(statuses)]
        try_at(prepared(lfs_hub, BRANCH_AND_TAG), number, Status(status), {REFUSED[status]})


@pytest.mark.slow
@pytest.mark.parametrize("effect", RECOVERED, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_passing_fault_at_any_request_is_no_failure(
    hub: RehearsalHub, prepared: Prepare, kind: Kind, effect: Effect
) -> None:
    for number in range(1, len(requests_of(prepared(hub, kind))) + 1):
        try_at(prepared(hub, kind), number, effect, {0})


@pytest.mark.slow
@pytest.mark.parametrize("status", REFUSED)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_refusal_of_any_request_ends_the_push_with_its_code(
    hub: RehearsalHub, prepared: Prepare, kind: Kind, status: int
) -> None:
    for number in range(1, len(requests_of(prepared(hub, kind))) + 1):
        try_at(prepared(hub, kind), number, Status(status), {REFUSED[status]})


@pytest.mark.slow
@pytest.mark.parametrize("effect", [Status(503), Status(429), Drop(), Drop(carried_out=True)], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_hub_that_goes_down_at_any_request_cannot_be_reached(
    lfs_hub: RehearsalHub, prepared: Prepare, kind: Kind, effect: Effect
) -> None:
    for number in range(1, len(requests_of(prepared(lfs_hub, kind))) + 1):
        try_at(prepared(lfs_hub, kind), number, effect, {8}, times=None)


@pytest.mark.parametrize("status", REFUSED)
@pytest.mark.parametrize("request_kind", ["GET */whoami-v2", "POST */preupload/*", "PUT *", COMMIT])
def test_what_was_refused_is_not_asked_for_again(
    lfs_hub: RehearsalHub, prepared: Prepare, pauses: list[float], request_kind: str, status: int
) -> None:
    plan = lfs_hub.disturb(Fault(request_kind, 1, Status(status), times=None))
    assert prepared(lfs_hub, FIRST).exit_code() == REFUSED[status]
    assert len(plan.struck) == len(set(plan.struck)) and pauses == []


@pytest.mark.parametrize("status", REFUSED)
def test_what_xet_is_refused_is_no_broken_connection(prepared: Prepare, status: int) -> None:
    with RehearsalHub(organizations=["org"]) as hub:
        plan = hub.disturb(Fault(XET_TOKEN, 2, Status(status), times=None))
        assert prepared(hub, FIRST).exit_code() == REFUSED[status]
        assert len(plan.struck) == 1


# Pauses


@pytest.mark.parametrize("request_kind", ["GET */whoami-v2", "POST */preupload/*", COMMIT])
def test_a_storm_of_429_is_sat_out_as_long_as_the_hub_asks(
    lfs_hub: RehearsalHub, prepared: Prepare, pauses: list[float], request_kind: str
) -> None:
    lfs_hub.disturb(Fault(request_kind, 1, Status(429, {"Retry-After": "70"}), times=4))
    assert prepared(lfs_hub, FIRST).exit_code() == 0
    assert len(pauses) == 4 and all(70 <= pause <= 71 for pause in pauses)


@pytest.mark.parametrize("request_kind", ["GET */whoami-v2", "POST */preupload/*", COMMIT])
def test_a_pause_that_is_too_long_is_not_waited_for(
    lfs_hub: RehearsalHub, prepared: Prepare, pauses: list[float], request_kind: str
) -> None:
    lfs_hub.disturb(Fault(request_kind, 1, Status(429, {"Retry-After": "3600"})))
    assert (prepared(lfs_hub, FIRST).exit_code(), pauses) == (8, [])


def test_without_a_wish_of_the_hub_the_pauses_grow(
    lfs_hub: RehearsalHub, prepared: Prepare, pauses: list[float]
) -> None:
    lfs_hub.disturb(Fault(COMMIT, 1, Status(503), times=4))
    assert (prepared(lfs_hub, FIRST).exit_code(), pauses) == (0, [1, 2, 4, 8])


# Parts of large files


@pytest.mark.parametrize("effect", [Drop(), Drop(carried_out=True), Status(500), Truncate()], ids=str)
def test_a_part_of_a_large_file_is_sent_again_and_all_parts_arrive(
    lfs_hub: RehearsalHub, prepared: Prepare, effect: Effect
) -> None:
    trial = prepared(lfs_hub, FIRST)
    large = written(trial.folder / "model.safetensors", weights_of("weight", (1, 2, 3), times=250_000))
    trial = replace(trial, files=[large, *trial.files[:2]])
    plan = lfs_hub.disturb(Fault("PUT */2", 1, effect), Fault("POST /storage/uploads/*", 1, effect))
    assert trial.exit_code() == 0
    assert len(plan.struck) == 2
    assert lfs_hub.read(trial.repo_id, "model.safetensors") == large.source.read_bytes()


@pytest.mark.parametrize("effect", [Drop(), Truncate()], ids=str)
def test_a_hub_that_goes_down_while_it_takes_large_files_cannot_be_reached(
    lfs_hub: RehearsalHub, prepared: Prepare, effect: Effect
) -> None:
    number = number_of("PUT *", requests_of(prepared(lfs_hub, FIRST)))
    try_at(prepared(lfs_hub, FIRST), number, effect, {8}, times=None)


# Other people, other times


def test_a_commit_of_somebody_else_is_refused_once_the_head_was_seen(lfs_hub: RehearsalHub, prepared: Prepare) -> None:
    requests = requests_of(prepared(lfs_hub, TAGGED))
    seen = number_of("GET */refs", requests)
    commit = number_of(COMMIT, requests)
    for number in (seen, seen + 1, commit - 4, commit, commit + 1):
        trial = prepared(lfs_hub, TAGGED)
        base = trial.commits("main")
        lfs_hub.disturb(Fault(ANY, number, Meanwhile(trial.commit_by_somebody_else)))
        code = trial.exit_code()
        after = trial.view()
        assert code == (7 if seen < number <= commit else 0)
        assert after.commits["main"][1 if code else 2 :] == base
        assert ("v1" in after.commits) == (code == 0)
        assert trial.run().tag == "v1"
        assert {file.path for file in trial.files} == trial.contents("v1").keys() - {".gitattributes", "LICENSE"}
        assert trial.contents("main")["LICENSE"] != trial.contents(base[0])["LICENSE"]


def test_a_lost_commit_is_found_below_that_of_somebody_else(hub: RehearsalHub, prepared: Prepare) -> None:
    trial = prepared(hub, TAGGED)

    def edit() -> None:
        with nullcontext() if hub.xet else without_xet():
            trial.api.create_commit(
                trial.repo_id, [CommitOperationAdd("config.json", b"{}")], commit_message="An edit of ours"
            )

    hub.disturb(Fault(COMMIT, 1, Drop(carried_out=True)), Fault("GET */refs", 3, Meanwhile(edit)))
    result = trial.run()
    assert trial.commits("main")[1] == result.commit == trial.commits("v1")[0]


@pytest.mark.parametrize("kind", [UPDATE, PULL_REQUEST], ids=str)
def test_a_commit_that_lands_after_the_gateway_gave_up_is_not_made_twice(
    lfs_hub: RehearsalHub, prepared: Prepare, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    monkeypatch.setattr("time.sleep", REAL_SLEEP)
    trial = prepared(lfs_hub, kind)
    before = trial.view()
    lfs_hub.disturb(Fault(COMMIT, 1, Late(0.3)))
    assert trial.exit_code() == 0
    assert require_as_before_or_complete(trial, before, trial.view())


@pytest.mark.parametrize("path", ["config.json", "model-00001-of-00002.safetensors"])
def test_a_wrong_digest_in_what_arrived_is_told_and_not_tagged(
    lfs_hub: RehearsalHub, prepared: Prepare, path: str
) -> None:
    listings = sum("/tree/" in request for request in requests_of(prepared(lfs_hub, TAGGED)))
    trial = prepared(lfs_hub, TAGGED)
    before = trial.view()
    lfs_hub.disturb(Fault("GET */tree/*", listings, WrongDigest(path)))
    assert trial.exit_code() == 9
    assert "v1" not in trial.view().commits
    require_finished_by_another_run(trial, before)


def test_a_token_that_expires_during_the_push_is_a_credential_error(hub: RehearsalHub, prepared: Prepare) -> None:
    count = len(requests_of(prepared(hub, BRANCH_AND_TAG)))
    for number in range(1, count + 1, 4):
        trial, token = prepared(hub, BRANCH_AND_TAG), hub.add_token()
        hub.disturb(Fault(ANY, number, Meanwhile(partial(hub.expire, token))))
        # What is put into the storage carries no token, so the next request is the first to be refused.
        assert trial.exit_code(token) == 6
        require_as_before_or_complete(trial, NOTHING, trial.view())
        require_finished_by_another_run(trial, NOTHING)


def test_a_token_that_expires_between_two_questions_is_told_before_a_weight_is_read(
    lfs_hub: RehearsalHub, prepared: Prepare
) -> None:
    trial, token = prepared(lfs_hub, UPDATE), lfs_hub.add_token()
    lfs_hub.disturb(Fault("GET /api/models/*", 1, Meanwhile(partial(lfs_hub.expire, token))))
    with pytest.raises(CredentialError):
        connect(Destination(trial.repo_id), token=token, endpoint=lfs_hub.endpoint)


# A killed process


def kill_at(trial: Trial, number: int) -> None:
    """``exporter publish`` in a process of its own, killed when the Hub has this request; then it is run again."""
    before = trial.view()
    processes: list[subprocess.Popen[str]] = []
    plan = trial.hub.disturb(Fault(ANY, number, Meanwhile(lambda: processes[0].kill())))
    with process(trial) as killed:
        processes.append(killed)
        killed.communicate(timeout=60)
    assert (killed.returncode, len(plan.struck)) == (-9, 1), f"request {number}"
    trial.hub.disturb()
    require_as_before_or_complete(trial, before, trial.view())
    with process(trial) as again:
        output, told = again.communicate(timeout=60)
    assert again.returncode == 0, told
    after = trial.view()
    assert require_as_before_or_complete(trial, before, after)
    assert output.splitlines()[-1].startswith(f"{trial.hub.endpoint}/{trial.repo_id}/")
    assert trial.run().status == "unchanged"
    assert trial.view() == after


def process(trial: Trial) -> subprocess.Popen[str]:
    environment = os.environ | {
        "HF_ENDPOINT": trial.hub.endpoint,
        "HF_TOKEN": trial.hub.token,
        "HF_HUB_DISABLE_XET": "0" if trial.hub.xet else "1",
        "HF_HOME": str(trial.folder.parent / "home"),
    }
    command = [sys.executable, "-m", "exporter", "publish", str(trial.folder), *trial.kind.arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def test_a_publish_that_is_killed_at_the_commit_or_the_tag_is_finished_by_the_next(
    hub: RehearsalHub, prepared: Prepare
) -> None:
    requests = requests_of(prepared(hub, TAGGED))
    commit = number_of(COMMIT, requests)
    for number in (commit + 1, len(requests)) if hub.xet else (commit,):
        kill_at(prepared(hub, TAGGED), number)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.ahead], ids=str)
def test_a_publish_may_be_killed_at_any_request(hub: RehearsalHub, prepared: Prepare, kind: Kind) -> None:
    for number in range(1, len(requests_of(prepared(hub, kind))) + 1):
        kill_at(prepared(hub, kind), number)


# Time limits


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "silent"),
    [
        (FIRST, "GET */whoami-v2"),
        (FIRST, "POST */repos/create"),
        (UPDATE, "POST */preupload/*"),
        (UPDATE, "PUT *"),
        (UPDATE, COMMIT),
        (PULL_REQUEST, COMMIT),
        (TAGGED, "POST */tag/*"),
    ],
    ids=str,
)
def test_a_hub_that_falls_silent_is_given_up_within_two_minutes(
    lfs_hub: RehearsalHub, prepared: Prepare, monkeypatch: pytest.MonkeyPatch, kind: Kind, silent: str
) -> None:
    number = number_of(silent, requests_of(prepared(lfs_hub, kind)))
    monkeypatch.setattr("time.sleep", REAL_SLEEP)
    trial = prepared(lfs_hub, kind)
    lfs_hub.disturb(Fault(ANY, number, Silence(), times=None))
    start = time.monotonic()
    assert trial.exit_code() == 8
    assert time.monotonic() - start < 120


@pytest.mark.slow
def test_a_refused_connection_is_given_up_within_a_minute(
    lfs_hub: RehearsalHub, prepared: Prepare, tmp_path: Path
) -> None:
    trial = prepared(lfs_hub, FIRST)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        lfs_hub.endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
    start = time.monotonic()
    with process(trial) as unreachable:
        unreachable.communicate(timeout=120)
    assert unreachable.returncode == 8
    assert time.monotonic() - start < 60
