"""A model on the Hub as the checkpoint, by the real huggingface_hub client against the rehearsal Hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import CommitOperationAdd, HfApi, constants
from safetensors.torch import load_file

from exporter import cli
from exporter.errors import (
    CheckpointError,
    CredentialError,
    ExportError,
    HubUnreachableError,
    OutputError,
    RefusedError,
    UsageError,
)
from exporter.hub import client as hub_client
from exporter.proof import ProofOptions, run_verify
from exporter.rehearsal import RehearsalHub
from exporter.report import Report
from exporter.source import find_model
from tests.conftest import Case, Console

REPO = "org/tiny"
Export = Callable[..., tuple[Path, dict[str, Any]]]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[RehearsalHub]:
    """The Hub that the client knows, with its token; the cache is empty, and no folder of that name is there."""
    with RehearsalHub(organizations=["org"]) as running:
        use(running, monkeypatch)
        monkeypatch.setattr(hub_client, "_PAUSES", (0.01,))
        (tmp_path / "work").mkdir()
        monkeypatch.chdir(tmp_path / "work")
        yield running


def use(hub: RehearsalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT and HF_TOKEN do; the client reads the former when it is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setenv("HF_TOKEN", hub.token)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def upload(hub: RehearsalHub, files: dict[str, bytes | Path], repo: str = REPO) -> str:
    """Commit ``files`` to the repository as somebody would; returns the commit."""
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    api.create_repo(repo, exist_ok=True, private=True)
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    return str(api.create_commit(repo, operations, commit_message="upload").oid)


def files_of(folder: Path) -> dict[str, bytes | Path]:
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


def cached_files(cache: Path, repo: str = REPO) -> set[str]:
    (snapshot,) = (cache / f"models--{repo.replace('/', '--')}" / "snapshots").iterdir()
    return {path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if not path.is_dir()}


def test_what_was_exported_and_published_is_exported_from_the_hub_again(
    hub: RehearsalHub, export: Export, cache: Path
) -> None:
    case = Case("llama-fp32-zero2")
    first, report = export(case.checkpoint, dtype="fp32", hf_repo_name=REPO, max_shard_size=30_000)
    assert report["status"] == "published"
    assert report["output"]["shards"] > 1
    folder, report = export(Path(REPO), dtype="bf16", cache_dir=cache, verify="load")
    commit = hub.repositories[REPO].resolve("main").oid
    assert report["checkpoint"]["repo_id"] == REPO
    assert report["checkpoint"]["revision"] == commit
    manifest = json.loads((folder / "export.json").read_text())
    assert (manifest["source"]["repo_id"], manifest["source"]["revision"]) == (REPO, commit)
    assert not any("/" in file["path"] for file in manifest["source"]["files"])
    expected = {
        name: tensor.to(torch.bfloat16)
        for path in first.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }
    written = load_file(folder / "model.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    card = (folder / "README.md").read_text()
    assert f"base_model: {REPO}\n" in card


def test_bin_weights_of_an_old_revision_become_safetensors(hub: RehearsalHub, export: Export, cache: Path) -> None:
    case = Case("falcon-bin-sharded")
    old = upload(hub, files_of(case.checkpoint))
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    api.create_tag(REPO, tag="v1/bin", revision=old)
    upload(hub, {"config.json": b"{}"})
    folder, report = export(Path(f"{REPO}@v1/bin"), dtype="keep", cache_dir=cache)
    assert report["checkpoint"]["revision"] == old
    same, _ = export(case.checkpoint, dtype="keep")
    assert (folder / "model.safetensors").read_bytes() == (same / "model.safetensors").read_bytes()
    again, report = export(Path(f"{REPO}@{old}"), dtype="keep", cache_dir=cache)
    assert (again / "export.json").read_bytes() == (folder / "export.json").read_bytes()


def test_only_what_an_export_needs_is_downloaded(hub: RehearsalHub, export: Export, cache: Path) -> None:
    checkpoint = Case("llama-safetensors").checkpoint
    others = (
        "pytorch_model.bin",
        "model-00001-of-00001.safetensors",
        "optimizer.pt",
        "train.py",
        "latest",
        "a/config.json",
    )
    upload(hub, {**files_of(checkpoint), **dict.fromkeys(others, b"not read")})
    export(Path(REPO), cache_dir=cache)
    fetched = cached_files(cache)
    assert fetched.isdisjoint(others)
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= fetched
    names = [name for path in cache.rglob("*") if (name := path.name) in others]
    assert not names


def test_what_else_the_cache_has_does_not_matter(hub: RehearsalHub, export: Export, cache: Path) -> None:
    files = files_of(Case("llama-safetensors").checkpoint)
    run = {f"checkpoint-5/{name}": content for name, content in files_of(Case("gpt2-safetensors").checkpoint).items()}
    upload(hub, {**files, **run})
    before, _ = export(Path(REPO), cache_dir=cache)
    from huggingface_hub import snapshot_download

    snapshot_download(REPO, endpoint=hub.endpoint, token=hub.token, cache_dir=cache)
    after, _ = export(Path(REPO), cache_dir=cache)
    assert (after / "export.json").read_bytes() == (before / "export.json").read_bytes()


def test_without_a_network_the_cache_is_enough(
    hub: RehearsalHub, export: Export, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(hub, files_of(Case("llama-safetensors-sharded").checkpoint))
    online, _ = export(Path(REPO), cache_dir=cache)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    requests = len(hub.requests)
    offline, _ = export(Path(REPO), cache_dir=cache)
    assert len(hub.requests) == requests
    assert (offline / "export.json").read_bytes() == (online / "export.json").read_bytes()
    with pytest.raises(HubUnreachableError, match="HF_HUB_OFFLINE"):
        export(Path("org/other"), cache_dir=cache)


def test_an_export_from_the_hub_is_proven_against_the_commit_that_it_was_made_from(
    hub: RehearsalHub, export: Export, cache: Path
) -> None:
    upload(hub, files_of(Case("llama-safetensors").checkpoint))
    folder, _ = export(Path(REPO), cache_dir=cache)
    upload(hub, files_of(Case("gpt2-safetensors").checkpoint))
    from exporter.hub import HubAccess

    report = Report()
    run_verify(ProofOptions(folder, Path(REPO), access=HubAccess(cache=cache)), report, Console(quiet=True))
    assert [check.name for check in report.checks] == ["files", "source"]
    with pytest.raises(ExportError):
        run_verify(
            ProofOptions(folder, Path(f"{REPO}@main"), access=HubAccess(cache=cache)), Report(), Console(quiet=True)
        )


def test_a_model_that_is_not_there_is_a_usage_error(
    hub: RehearsalHub, export: Export, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(hub, {"empty.txt": b"x"})
    with pytest.raises(UsageError, match="no model org/other"):
        export(Path("org/other"), cache_dir=cache)
    with pytest.raises(UsageError, match="no revision v9"):
        export(Path(f"{REPO}@v9"), cache_dir=cache)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        export(Path(REPO), cache_dir=cache)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("exporter.hub.account._configured_token", lambda: None)
    with pytest.raises(UsageError, match="without a token"):
        export(Path(REPO), cache_dir=cache)


def test_a_bad_token_and_a_gated_model_are_a_matter_of_rights(
    hub: RehearsalHub, export: Export, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from exporter.rehearsal.api import Api
    from exporter.rehearsal.repository import Refusal

    upload(hub, files_of(Case("llama-safetensors").checkpoint))
    with pytest.raises(CredentialError, match="Invalid credentials"):
        export(Path(REPO), cache_dir=cache, auth_token="hf_wrong")
    original = Api.resolve

    async def gated(self: Api, request: Any) -> Any:
        if request.method in ("GET", "HEAD"):
            raise Refusal(403, f"Access to model {REPO} is restricted", "GatedRepo")
        return await original(self, request)

    monkeypatch.setattr(Api, "resolve", gated)
    with RehearsalHub(organizations=["org"]) as other:
        use(other, monkeypatch)
        upload(other, files_of(Case("llama-safetensors").checkpoint))
        with pytest.raises(CredentialError, match="gated"):
            export(Path(REPO), cache_dir=cache)


def test_a_hub_that_does_not_answer_is_unreachable(
    hub: RehearsalHub, export: Export, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubUnreachableError):
        export(Path(REPO), cache_dir=cache)


def test_a_cache_that_cannot_be_written_is_named(hub: RehearsalHub, export: Export, cache: Path) -> None:
    upload(hub, files_of(Case("llama-safetensors").checkpoint))
    cache.write_text("a file")
    with pytest.raises(OutputError, match=r"config\.json of org/tiny cannot be kept"):
        export(Path(REPO), cache_dir=cache)


def test_a_repository_without_weights_is_no_checkpoint(hub: RehearsalHub, export: Export, cache: Path) -> None:
    upload(hub, {"config.json": b"{}", "tokenizer.json": b"{}", "model.gguf": b"x"})
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors"):
        export(Path(REPO), cache_dir=cache)
    upload(hub, {"adapter_config.json": b"{}"})
    with pytest.raises(RefusedError, match="adapter"):
        export(Path(REPO), cache_dir=cache)


def test_a_folder_with_a_typing_error_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "falcon").mkdir(parents=True)
    assert find_model(Path("runs/falcon")) is None
    for name in ("falcon", "runs/falcn", "out/checkpoint-7", "./falcon", "/no/where", "a/b/c", "a/b@", "-x/y", "a b/c"):
        with pytest.raises(UsageError, match="There is no checkpoint"):
            find_model(Path(name))
    assert str(find_model(Path("runs/falcn@main"))) == "runs/falcn@main"
    assert find_model(Path("org/falcon@refs/pr/1")).revision == "refs/pr/1"  # type: ignore[union-attr]
    assert find_model(Path("org/falcon")).revision is None  # type: ignore[union-attr]


def custom_checkpoint(place: Path, repository: str) -> tuple[Path, dict[str, bytes | Path]]:
    """A checkpoint whose code lies in ``repository``, and that code."""
    folder = Case("custom-zero2").copy(place)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {key: f"{repository}--{entry}" for key, entry in config["auto_map"].items()}
    (folder / "config.json").write_text(json.dumps(config))
    code: dict[str, bytes | Path] = {path.name: path.read_bytes() for path in folder.glob("*.py")}
    for name in code:
        (folder / name).unlink()
    return folder, code


def test_code_of_another_repository_is_published_at_the_commit_that_was_seen(
    hub: RehearsalHub, export: Export, cache: Path, tmp_path: Path
) -> None:
    checkpoint, code = custom_checkpoint(tmp_path, "org/code")
    commit = upload(hub, {**code, "unrelated.py": b"x = 1", "README.txt": b"x"}, "org/code")
    with pytest.raises(RefusedError, match="org/code--"):
        export(checkpoint, cache_dir=cache)
    assert not any("org/code/resolve" in path for _, path in hub.requests)
    trusted = {"prompt_format": "none", "trust_remote_code": True}
    folder, report = export(checkpoint, cache_dir=cache, verify="load", **trusted)
    assert report["checks"][-1]["name"] == "load"
    manifest = json.loads((folder / "export.json").read_text())
    assert manifest["source"]["code"] == {"org/code": commit}
    listed = {file["path"] for file in manifest["files"]}
    assert set(code) <= listed and "unrelated.py" not in listed
    assert "--" not in json.dumps(json.loads((folder / "config.json").read_text())["auto_map"])
    upload(hub, dict.fromkeys(code, b"raise SystemExit"), "org/code")
    run_verify(ProofOptions(folder, checkpoint, trust_remote_code=True), Report(), Console(quiet=True))


def test_the_code_of_a_model_on_the_hub_comes_with_it(hub: RehearsalHub, export: Export, cache: Path) -> None:
    trusted = {"prompt_format": "none", "trust_remote_code": True}
    exported, _ = export(Case("custom-zero2").checkpoint, **trusted)
    files = files_of(exported)
    del files["README.md"]
    upload(hub, {**files, "setup.py": b"raise SystemExit", "sub/own.py": b"x = 1"})
    folder, _ = export(Path(REPO), cache_dir=cache, dtype="keep", verify="load", **trusted)
    assert {path.name for path in folder.glob("*.py")} == {path.name for path in exported.glob("*.py")}
    assert cached_files(cache).isdisjoint({"setup.py", "sub/own.py"})
    assert (folder / "model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()


def test_a_module_that_the_other_repository_lacks_is_refused(
    hub: RehearsalHub, export: Export, cache: Path, tmp_path: Path
) -> None:
    checkpoint, code = custom_checkpoint(tmp_path, "org/code")
    upload(hub, {"configuration_tiny.py": code["configuration_tiny.py"]}, "org/code")
    with pytest.raises((RefusedError, CheckpointError), match=r"modeling_tiny\.py"):
        export(checkpoint, cache_dir=cache, trust_remote_code=True)


def test_the_command_line_takes_a_model_and_the_card_names_it(hub: RehearsalHub, cache: Path, tmp_path: Path) -> None:
    upload(hub, files_of(Case("llama-safetensors").checkpoint))
    words = [REPO, "--output_folder", str(tmp_path / "out"), "--cache_dir", str(cache)]
    finished = CliRunner().invoke(cli.export, words)
    assert finished.exit_code == 0
    assert f"{REPO} is commit {hub.repositories[REPO].resolve('main').oid}." in finished.stderr
    assert "\r" not in finished.stderr
    assert f"python export_model.py {REPO}" in (tmp_path / "out" / "README.md").read_text()
    assert str(tmp_path) not in (tmp_path / "out" / "README.md").read_text()
    seen = CliRunner().invoke(cli.inspect, [REPO, "--cache_dir", str(cache)])
    assert seen.exit_code == 0 and f"repo_id: {REPO}\n" in seen.stdout
    inside = CliRunner().invoke(cli.export, [REPO, "--output_folder", str(cache / "x"), "--cache_dir", str(cache)])
    assert inside.exit_code == 2
    assert CliRunner().invoke(cli.export, ["org/none", "--dry_run"]).exit_code == 2
