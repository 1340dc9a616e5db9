"""What a CI job learns of a run, and the action and the workflow with which it runs one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from huggingface_hub import HfApi

from exporter.ci import MAX_FILES, OUTPUTS, tell_job
from exporter.cli import main
from exporter.errors import CredentialError, HubUnreachableError, OutputError
from exporter.hub import Destination, connect, has_token
from exporter.rehearsal import RehearsalHub
from tests.conftest import Case

Export = Callable[..., tuple[Path, dict[str, Any]]]
ROOT = Path(__file__).parent.parent
ACTION = ROOT / "action.yml"
WORKFLOW = ROOT / "docs" / "release-model.yml"
CHECKPOINT = Case("llama-safetensors").checkpoint
NAME = "Org/model"
CARD = "---\nlibrary_name: transformers\n---\n"


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a job: GitHub's files are in it, and no token is known."""
    for name in [name for name in os.environ if name.startswith(("HF_", "GITHUB_", "ACTIONS_", "EXPORT_MODEL_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GITHUB_OUTPUT", str(tmp_path / "outputs"))
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-login"))
    monkeypatch.setattr("huggingface_hub.utils._auth._OIDC_TOKEN_CACHE", None)
    return tmp_path


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[RehearsalHub]:
    with RehearsalHub(organizations=["Org"]) as running:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", running.endpoint)
        yield running


def outputs(job: Path) -> dict[str, str]:
    """The outputs as GitHub's runner reads them: NAME<<DELIMITER, lines, DELIMITER; the last one of a name counts."""
    lines, found = iter((job / "outputs").read_text().splitlines()), {}
    for line in lines:
        name, delimiter = line.split("<<")
        value: list[str] = []
        while (following := next(lines)) != delimiter:
            value.append(following)
        found[name] = "\n".join(value)
    return found


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, [*arguments, "--quiet"])


def test_a_job_learns_where_each_stage_of_a_release_ended(job: Path, hub: RehearsalHub) -> None:
    folder = str(job / "out")
    assert (
        invoke("export", str(CHECKPOINT), "--hf_repo_name", NAME, "--no_publish", "--output_folder", folder).exit_code
        == 0
    )
    assert outputs(job) == {name: "" for name in OUTPUTS} | {"status": "exported", "exit_code": "0"}
    assert invoke("verify", folder).exit_code == 0
    assert outputs(job)["status"] == "verified"
    arguments = ["publish", folder, "--auth_token", hub.token]
    assert invoke(*arguments, "--release_tag", "v1").exit_code == 0
    commit = HfApi(hub.endpoint, token=hub.token).model_info(NAME, revision="v1").sha
    published = {"status": "published", "url": f"{hub.endpoint}/{NAME}/tree/{commit}", "commit": commit, "tag": "v1"}
    assert outputs(job) == {"exit_code": "0", "pr_url": "", **published}
    assert invoke(*arguments).exit_code == 0
    assert (outputs(job)["status"], outputs(job)["commit"]) == ("unchanged", commit)
    assert invoke(*arguments, "--hf_repo_name", "Org/other").exit_code == 2
    assert outputs(job) == {name: "" for name in OUTPUTS} | {"status": "failed", "exit_code": "2"}
    summary = (job / "summary.md").read_text()
    for status in ("exported", "verified", "published", "unchanged", "failed"):
        assert f"### Export: {status}\n" in summary
    assert "| files | passed | " in summary
    assert f"| {published['url']} | main | {commit} | v1 |" in summary
    assert "| model.safetensors | " in summary
    assert "(exit code 2)" in summary


def test_a_job_learns_that_a_published_repository_was_verified(job: Path, hub: RehearsalHub, export: Export) -> None:
    folder, _ = export(CHECKPOINT, hf_repo_name=NAME, no_publish=True, verify="files")
    assert invoke("publish", str(folder), "--auth_token", hub.token, "--public").exit_code == 0
    released = outputs(job)
    finished = invoke("verify", NAME, "--json")
    assert (finished.exit_code, outputs(job)) == (0, released | {"status": "verified"})
    report = json.loads(finished.stdout)["hub"]
    assert {"revision": "main", "uploaded_bytes": 0, "added": [], "deleted": []}.items() <= report.items()
    assert {*report["unchanged"], "export.json"} == {path.name for path in folder.iterdir()}


def test_the_summary_of_a_dry_run_has_the_plan_file_by_file(job: Path, hub: RehearsalHub, export: Export) -> None:
    folder, _ = export(CHECKPOINT, hf_repo_name=NAME, no_publish=True, verify="files", max_shard_size=20_000)
    assert invoke("publish", str(folder), "--auth_token", hub.token).exit_code == 0
    (job / "summary.md").unlink()
    plan = ["export", str(CHECKPOINT), "--hf_repo_name", NAME, "--dry_run", "--auth_token", hub.token]
    assert invoke(*plan).exit_code == 0
    summary = (job / "summary.md").read_text()
    assert "| planned | revision | commit | tag |" in summary
    for action, path in {
        "add": "model.safetensors",
        "replace": "README.md",
        "delete": "model.safetensors.index.json",
        "leave": "config.json",
        "keep": ".gitattributes",
    }.items():
        assert f"| {action} | {path} |" in summary


def test_a_pull_request_is_an_output(job: Path, hub: RehearsalHub, export: Export) -> None:
    HfApi(hub.endpoint, token=hub.token).create_repo(NAME)
    folder, _ = export(CHECKPOINT, hf_repo_name=NAME, no_publish=True, verify="files")
    assert invoke("publish", str(folder), "--auth_token", hub.token, "--create_pr").exit_code == 0
    assert outputs(job)["pr_url"] == outputs(job)["url"] == f"{hub.endpoint}/{NAME}/discussions/1"


def report(**facts: Any) -> dict[str, Any]:
    empty = {"status": "failed", "error": None, "output": {}, "tensors": {}, "checks": [], "hub": None}
    return empty | facts


def test_no_value_sets_another_output_or_leaves_its_cell(job: Path) -> None:
    sly = "v1\nstatus<<end\npublished\nend\n| <b>*`[x](y)"
    published = {"url": "u", "commit": "c", "tag": sly, "pr_url": None, "revision": sly}
    counts = {"added": (), "deleted": (), "unchanged": ()}
    tell_job(report(hub=published | counts), 7)
    assert outputs(job) == {"status": "failed", "exit_code": "7", "url": "u", "commit": "c", "tag": sly, "pr_url": ""}
    (row,) = [line for line in (job / "summary.md").read_text().splitlines() if line.startswith("| u |")]
    assert len(re.findall(r"(?<!\\)\|", row)) == 5
    assert "\\<b>\\*\\`\\[x](y)" in row


def test_a_summary_of_thousands_of_files_stays_small(job: Path) -> None:
    files = [{"path": f"model-{i:05}.safetensors", "size": 1, "sha256": "0" * 64} for i in range(20_000)]
    tell_job(report(output={"files": files, "shards": 1, "total_size": 1, "dtype": "bf16"}), 0)
    assert len((job / "summary.md").read_bytes()) < 100_000
    assert f"and {20_000 - MAX_FILES} more files" in (job / "summary.md").read_text()


def test_without_a_job_nothing_is_written(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GITHUB_OUTPUT")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "")
    tell_job(report(), 1)
    assert list(job.iterdir()) == []


def test_outputs_that_cannot_be_written_are_exit_5(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_OUTPUT", str(job / "none" / "outputs"))
    with pytest.raises(OutputError, match="GITHUB_OUTPUT"):
        tell_job(report(), 0)
    finished = invoke("inspect", str(CHECKPOINT))
    assert (finished.exit_code, finished.stdout) == (5, "")
    assert str(job) not in finished.stderr


# Trusted publishing


def become_publisher(hub: RehearsalHub, monkeypatch: pytest.MonkeyPatch, repository: str = NAME) -> None:
    for name, value in hub.trust(repository).items():
        monkeypatch.setenv(name, value)


def test_a_trusted_publisher_releases_without_a_stored_token(
    job: Path, hub: RehearsalHub, export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    HfApi(hub.endpoint, token=hub.token).create_repo(NAME)
    folder, _ = export(CHECKPOINT, hf_repo_name=NAME, no_publish=True, verify="files")
    become_publisher(hub, monkeypatch)
    finished = invoke("publish", str(folder), "--release_tag", "v1")
    assert finished.exit_code == 0, finished.stderr
    assert "model.safetensors" in HfApi(hub.endpoint, token=hub.token).list_repo_files(NAME, revision="v1")
    assert [path for _, path in hub.requests].count("/oauth/token") == 1
    assert invoke("publish", str(folder)).exit_code == 0
    assert outputs(job)["status"] == "unchanged"


def test_an_identity_can_come_from_another_ci_system(
    job: Path, hub: RehearsalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub._oidc import get_oidc_token

    HfApi(hub.endpoint, token=hub.token).create_repo(NAME)
    become_publisher(hub, monkeypatch)
    identity = get_oidc_token()
    for name in ("GITHUB_ACTIONS", "ACTIONS_ID_TOKEN_REQUEST_URL", "ACTIONS_ID_TOKEN_REQUEST_TOKEN"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_OIDC_ID_TOKEN", identity)
    assert connect(Destination(NAME), endpoint=hub.endpoint, card=CARD).exists


def test_a_trusted_publisher_that_cannot_release_is_told_before_any_work(
    job: Path, hub: RehearsalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    become_publisher(hub, monkeypatch)
    with pytest.raises(CredentialError, match="cannot create it"):
        connect(Destination(NAME), endpoint=hub.endpoint)
    HfApi(hub.endpoint, token=hub.token).create_repo(NAME)
    with pytest.raises(CredentialError, match="open pull request"):
        connect(Destination(NAME, create_pr=True), endpoint=hub.endpoint)
    HfApi(hub.endpoint, token=hub.token).create_repo("Org/other")
    with pytest.raises(CredentialError, match="HF_OIDC_RESOURCE=Org/model may not write to Org/other"):
        connect(Destination("Org/other"), endpoint=hub.endpoint)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"HF_OIDC_RESOURCE": "Org/other"}, "the Hub gave no token"),
        ({"ACTIONS_ID_TOKEN_REQUEST_TOKEN": "wrong-request-token"}, "the Hub gave no token"),
        ({"ACTIONS_ID_TOKEN_REQUEST_TOKEN": ""}, "id-token: write"),
        ({"GITHUB_ACTIONS": ""}, "HF_OIDC_ID_TOKEN"),
    ],
    ids=str,
)
def test_a_job_that_the_hub_does_not_trust_gets_no_token(
    change: Mapping[str, str], said: str, job: Path, hub: RehearsalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    become_publisher(hub, monkeypatch)
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    assert has_token(None)
    with pytest.raises(CredentialError, match=said):
        connect(Destination(NAME), endpoint=hub.endpoint)


def test_an_exchange_that_nobody_answers_may_be_tried_again(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RehearsalHub() as gone:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", gone.endpoint)
        become_publisher(gone, monkeypatch)
    with pytest.raises(HubUnreachableError, match="HF_OIDC_RESOURCE"):
        connect(Destination(NAME), endpoint=gone.endpoint)


# The action and the workflow


def lint(project: Path) -> subprocess.CompletedProcess[str]:
    """actionlint, which knows GitHub's syntax, expressions and rights, and a local action's inputs and outputs."""
    program = shutil.which("actionlint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert program, "actionlint comes with the extra [test]"
    workflows = map(str, (project / ".github" / "workflows").iterdir())
    return subprocess.run(
        [program, "-no-color", "-shellcheck=", "-pyflakes=", *workflows], cwd=project, capture_output=True, text=True
    )


def project(place: Path, action: str, workflow: str) -> Path:
    """A repository with the action, and with the workflow that uses it from there."""
    (place / ".github" / "workflows").mkdir(parents=True)
    (place / ".git").mkdir()
    (place / "action.yml").write_text(action)
    (place / ".github" / "workflows" / "release.yml").write_text(workflow.replace("OWNER/export-model@v1", "./"))
    return place


def test_actionlint_accepts_the_example_with_the_action(tmp_path: Path) -> None:
    finished = lint(project(tmp_path, ACTION.read_text(), WORKFLOW.read_text()))
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("command: publish", "comand: publish"),
        ("steps.publish.outputs.url", "steps.publish.outputs.adress"),
        ("needs.export.outputs.artifact", "needs.export.outputs.model"),
        ("id-token: write", "id-token: wrote"),
        ("steps.run.outputs.commit }}", "steps.run.outputs.commit"),
    ],
)
def test_actionlint_would_notice_a_mistake(right: str, wrong: str, tmp_path: Path) -> None:
    action, workflow = ACTION.read_text(), WORKFLOW.read_text()
    assert right in action + workflow
    finished = lint(project(tmp_path, action.replace(right, wrong), workflow.replace(right, wrong)))
    assert finished.returncode == 1, finished.stdout


def test_the_job_with_the_checkpoint_has_no_right_and_the_one_with_the_right_has_no_checkpoint() -> None:
    workflow = yaml.safe_load(WORKFLOW.read_text())
    export, publish = workflow["jobs"]["export"], workflow["jobs"]["publish"]
    assert workflow["permissions"] == {} and "permissions" not in export
    assert publish["permissions"] == {"id-token": "write"}
    assert "secrets." not in WORKFLOW.read_text()
    assert "inputs.checkpoint" not in json.dumps(publish)
    assert "artifact-id }}" in export["outputs"]["artifact"]
    assert "needs.export.outputs.artifact" in json.dumps(publish["steps"][0]["with"])


def run_action(place: Path, inputs: Mapping[str, str], **environment: str) -> subprocess.CompletedProcess[str]:
    """The action's steps as a runner runs them: bash -e with the inputs in the environment that the action sets."""
    action = yaml.safe_load(ACTION.read_text())
    known = {name: str(value.get("default", "")) for name, value in action["inputs"].items()} | dict(inputs)
    commands = place / "bin"
    commands.mkdir(exist_ok=True)
    (commands / "exporter").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m exporter "$@"\n')
    (commands / "exporter").chmod(0o755)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "ACTIONS_"))}
    clean |= {"PATH": f"{commands}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), **environment}
    for step in action["runs"]["steps"]:
        values = {"github.action_path": str(ROOT)} | {f"inputs.{name}": value for name, value in known.items()}
        given = {name: values[text.strip("${} ")] for name, text in step["env"].items()}
        script = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
        finished = subprocess.run(
            script, cwd=place, env=clean | given, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
        )
        if finished.returncode:
            break
    return finished


def test_two_jobs_release_a_model_as_the_example_says(job: Path, hub: RehearsalHub) -> None:
    HfApi(hub.endpoint, token=hub.token).create_repo(NAME)
    workflow = yaml.safe_load(WORKFLOW.read_text())
    values = {"checkpoint": str(CHECKPOINT), "repository": NAME, "tag": "v1;touch${IFS}x"}
    steps = [step["with"] for name in ("export", "publish") for step in workflow["jobs"][name]["steps"]]
    export, publish = (with_ for with_ in steps if "target" in with_)

    def filled(inputs: dict[str, str]) -> dict[str, str]:
        text = json.dumps(inputs)
        for name, value in values.items():
            text = text.replace(f"${{{{ inputs.{name} }}}}", value)
        return json.loads(text)  # type: ignore[no-any-return]

    first, second = job / "first", job / "second"
    first.mkdir()
    second.mkdir()
    exported = run_action(first, filled(export), HF_ENDPOINT="http://127.0.0.1:9")
    assert exported.returncode == 0, exported.stderr
    assert outputs(job)["status"] == "exported"
    shutil.copytree(first / "model", second / "model")
    trusted = hub.trust(NAME) | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(job / "home")}
    published = run_action(second, filled(publish), **trusted)
    assert published.returncode == 0, published.stderr
    assert outputs(job)["tag"] == values["tag"]
    assert not (second / "x").exists()
    assert json.loads((second / "export-report.json").read_text())["status"] == "published"
    assert {
        entry.path for entry in HfApi(hub.endpoint, token=hub.token).list_repo_tree(NAME, revision=values["tag"])
    } == {
        ".gitattributes",
        *(path.name for path in (first / "model").iterdir()),
    }


def test_a_failing_run_fails_the_step_and_still_has_outputs(job: Path) -> None:
    finished = run_action(job, {"target": "no-such-folder", "options": "--dry_run"})
    assert finished.returncode == 2
    assert outputs(job)["exit_code"] == "2"
