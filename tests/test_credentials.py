"""No credential is published or printed, and no ordinary file is taken for one."""

from __future__ import annotations

import base64
import json
import os
import re
import secrets
import string
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from exporter.cli import main
from exporter.console import Console
from exporter.credentials import find_credentials, redact, require_no_credentials
from exporter.errors import CheckpointError, RefusedError, VerificationError
from exporter.rehearsal import RehearsalHub
from exporter.release import PublishOptions, run_publish
from exporter.report import Report
from tests.conftest import ALL_CASES, Case

Export = Callable[..., tuple[Path, dict[str, Any]]]
ROOT = Path(__file__).parent.parent
LLAMA = Case("llama-safetensors")
NAME = "Org/model"


def letters(count: int, alphabet: str = string.ascii_letters + string.digits) -> str:
    return "".join(secrets.choice(alphabet) for _ in range(count - 1)) + "7"


UPPER = string.ascii_uppercase + string.digits
HEX = "0123456789abcdef"
PLANTED = {
    "hub": f"hf_{letters(34)}",
    "hub oidc": f"hf_jwt_eyJ{letters(60)}.{letters(40)}",
    "hub organization": f"api_org_{letters(34)}",
    "aws id": f"AKIA{letters(16, UPPER)}",
    "aws secret": f"aws_secret_access_key = {letters(40)}",
    "google": f"AIza{letters(35)}",
    "google oauth": f"ya29.{letters(60)}",
    "azure": f"DefaultEndpointsProtocol=https;AccountName=a;AccountKey={base64.b64encode(os.urandom(64)).decode()}",
    "azure sas": f"https://a.example/c?sv=2024&sig={letters(43)}%3D",
    "github": f"ghp_{letters(36)}",
    "github fine-grained": f"github_pat_{letters(22)}_{letters(59)}",
    "gitlab": f"glpat-{letters(20)}",
    "slack": f"xoxb-{letters(12, string.digits)}-{letters(24)}",
    "openai": f"sk-proj-{letters(80)}",
    "openai old": f"sk-{letters(48)}",
    "anthropic": f"sk-ant-api03-{letters(90)}",
    "wandb": f"WANDB_API_KEY={letters(40, HEX)}",
    "wandb as an option": f"--wandb_api_key {letters(40, HEX)}",
    "wandb in a config": f'"wandb_key": "{letters(40, HEX)}"',
    "named token": f"NEPTUNE_API_TOKEN={letters(60)}==",
    "groq": f"gsk_{letters(52)}",
    "xai": f"xai-{letters(80)}",
    "nvidia": f"nvapi-{letters(64)}",
    "perplexity": f"pplx-{letters(48)}",
    "replicate": f"r8_{letters(37)}",
    "databricks": f"dapi{letters(32, HEX)}",
    "digitalocean": f"dop_v1_{letters(64, HEX)}",
    "npm": f"npm_{letters(36)}",
    "pypi": f"pypi-AgEIcHlwaS5vcmc{letters(100)}",
    "stripe": f"sk_live_{letters(24)}",
    "sendgrid": f"SG.{letters(22)}.{letters(43)}",
    "jwt": f"Authorization: Bearer eyJ{letters(33)}.eyJ{letters(60)}.{letters(43)}",
    "age": f"AGE-SECRET-KEY-1{letters(58, UPPER)}",
    "ssh key": "-----BEGIN OPENSSH PRIVATE KEY-----",
    "service account": '{"private_key": "-----BEGIN PRIVATE KEY-----\\nMIIE"}',
    "url": f"https://me:{letters(12)}@example.org/x",
    "environment in code": f'os.environ["HF_TOKEN"] = "{letters(40)}"',
}

ORDINARY = [
    b'tokenizer.push_to_hub(token=os.environ["HF_TOKEN"])',
    b"api_key = os.environ.get('OPENAI_API_KEY', default_key_for_tests)",
    b'"hf_token": null, "hub_token": "<HUB_TOKEN>", "access_token": 12345',
    b"WANDB_API_KEY=$WANDB_API_KEY HF_TOKEN=${HF_TOKEN} HF_TOKEN_PATH=/data/x1234567890123456789",
    b"hf_hub_download hf_transfer hf_device_map AKIAB sk-learn task-" + b"a1" * 20,
    b"-----BEGIN PUBLIC KEY-----",
    b"https://example.org:8080/a@b http://user@example.org git@github.com:a/b.git",
    b"sha256:" + b"0123456789abcdef" * 4,
    b"SG.eval r8_a8_quant npm_config_registry eyJhbGciOiJIUzI1NiJ9 dapi gsk_ xai-grok-2 sk_live_demo pypi-AgE",
    b"max_api_token: 4096 api_token_count = 3, api_secret=read_secret_from_the_vault_v2()",
    b"glpat xoxb sk-ant ghp_short github_pat_",
]


@pytest.mark.parametrize("kind", PLANTED)
@pytest.mark.parametrize("around", ["{}", 'x\n"{}"\n', '{{"a": "b\\n{}"}}', "key: {}\n"], ids=repr)
def test_a_planted_credential_is_found_and_said_without_itself(kind: str, around: str) -> None:
    text = "first\n" + around.format(PLANTED[kind])
    with pytest.raises(RefusedError, match=r"own\.json holds an? .* in line [23]") as refused:
        require_no_credentials({"a.txt": b"nothing", "own.json": text.encode()})
    parts = [part for part in re.findall(r"\w{12,}", PLANTED[kind]) if re.search(r"\d", part)]
    for told in (refused.value.message, refused.value.hint, redact(text)):
        assert not any(part in told for part in parts)


@pytest.mark.parametrize("text", ORDINARY, ids=lambda text: text[:20].decode())
def test_an_ordinary_text_holds_none(text: bytes) -> None:
    assert list(find_credentials(text)) == []
    assert redact(text.decode()) == text.decode()


@pytest.mark.parametrize("case", ALL_CASES, ids=lambda case: case.name)
def test_the_files_of_real_checkpoints_hold_none(case: Case) -> None:
    texts = {path.name: path.read_bytes() for path in case.checkpoint.rglob("*") if path.suffix in (".json", ".py")}
    require_no_credentials(texts)


def test_the_code_of_real_models_holds_none() -> None:
    """A library's source has every word that a checkpoint's own code may have."""
    import transformers

    for path in sorted((Path(transformers.__file__).parent / "models").glob("[a-f]*/*.py")):
        assert list(find_credentials(path.read_bytes())) == [], path.name


def test_a_vocabulary_of_two_million_random_pieces_holds_none_and_takes_a_second() -> None:
    alphabet = (string.ascii_letters + string.digits + "_-=/:@. ").encode()
    noise = os.urandom(30_000_000).translate(bytes(alphabet[byte % len(alphabet)] for byte in range(256)))
    pieces = b'",\n"'.join(noise[start : start + 15] for start in range(0, len(noise), 15))
    begin = time.process_time()
    assert list(find_credentials(pieces, ["hf_" + "x" * 34])) == []
    assert time.process_time() - begin < 10  # about one second on an idle core; quadratic would take hours


@pytest.mark.parametrize("mark", [b"sk-", b"sk-proj-", b"://a:", b"api_key ", b"hf_a", b"-----BEGIN ", b"api_key=aaaa"])
def test_the_time_is_linear_in_the_text(mark: bytes) -> None:
    begin = time.process_time()
    list(find_credentials(mark * 160_000))
    assert time.process_time() - begin < 5  # a fraction of a second; quadratic would take minutes


def test_the_token_of_the_run_is_found_whatever_its_form() -> None:
    with pytest.raises(RefusedError, match=r"config\.json holds the token of this run in line 2"):
        require_no_credentials({"config.json": b'{\n"a": "canary-bird-1"}'}, ["canary-bird-1"])
    assert redact("a canary-bird-1", ["canary-bird-1"]) == "a <redacted>"


# An export


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "chat_template.jinja"]
)
def test_an_export_refuses_a_credential_in_a_file_of_the_checkpoint(name: str, tmp_path: Path, export: Export) -> None:
    folder, secret = LLAMA.copy(tmp_path), PLANTED["github"]
    if name.endswith(".jinja"):
        (folder / name).write_text("{# " + secret + " #}{{ messages[0]['content'] }}")
    else:
        document = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        if name == "tokenizer.json":
            added, vocabulary = document["added_tokens"], document["model"]["vocab"]
            ids = [*vocabulary.values(), *(token["id"] for token in added)]
            added.append(added[-1] | {"id": max(ids) + 1, "content": secret})
        else:
            document["note"] = secret
        (folder / name).write_text(json.dumps(document))
    with pytest.raises(RefusedError, match=r"holds a GitHub token in line") as refused:
        export(folder)
    assert refused.value.message.startswith(name)


def test_an_export_refuses_a_credential_in_custom_code(tmp_path: Path, export: Export) -> None:
    folder = Case("custom-zero2").copy(tmp_path)
    code = next(folder.glob("modeling_*.py"))
    code.write_text(f"{code.read_text()}\n# {PLANTED['openai']}\n")
    with pytest.raises(RefusedError, match=rf"{code.name} holds an API key"):
        export(folder, trust_remote_code=True, prompt_format="none")


def test_an_export_refuses_a_credential_in_what_the_user_gives(tmp_path: Path, export: Export) -> None:
    config = tmp_path / "falcon.yaml"
    config.write_text(f"falcon:\n  wandb_api_key: {letters(40, HEX)}\n")
    with pytest.raises(RefusedError, match=r"falcon\.yaml holds a credential in line 2"):
        export(LLAMA.checkpoint, training_configs=(config,))
    with pytest.raises(RefusedError, match=r"--train_command holds a Hugging Face token"):
        export(LLAMA.checkpoint, train_command=f"HF_TOKEN={PLANTED['hub']} deepspeed train.py")
    with pytest.raises(RefusedError, match=r"--commit_message holds"):
        export(LLAMA.checkpoint, commit_message=PLANTED["hub"])


def test_an_export_refuses_a_credential_that_only_the_manifest_would_show(tmp_path: Path, export: Export) -> None:
    template = tmp_path / f"{PLANTED['github']}.jinja"
    template.write_text("{{ messages[0]['content'] }}")
    with pytest.raises(RefusedError, match=r"export\.json holds a GitHub token"):
        export(LLAMA.checkpoint, prompt_format=str(template))
    folder, tag = Case("llama-zero2").copy(tmp_path), PLANTED["gitlab"]
    (folder / (folder / "latest").read_text().strip()).rename(folder / tag)
    (folder / "latest").write_text(tag)
    with pytest.raises(RefusedError, match=r"export\.json holds a GitLab token"):
        export(folder)


def test_the_report_of_a_refused_run_does_not_hold_what_it_was_refused_for(tmp_path: Path) -> None:
    report, secret = tmp_path / "report.json", PLANTED["github"]
    arguments = [str(LLAMA.checkpoint), "--dry_run", "--special_token", secret, "--report", str(report), "--json"]
    result = CliRunner().invoke(main, ["export", *arguments])
    assert result.exit_code == 4
    assert json.loads(report.read_text())["vocabulary"]["added"][-1] == "<redacted>"
    assert secret not in report.read_text() + result.output


def test_only_the_files_of_an_export_are_published(tmp_path: Path, export: Export) -> None:
    """Everything else that lies in a checkpoint folder stays there, and is no reason to fail."""
    folder, outside = LLAMA.copy(tmp_path), tmp_path / "outside.txt"
    outside.write_text("canary")
    for name in (".env", "id_rsa", "training_args.bin", "optimizer.pt", "rng_state.pth", "notes.txt"):
        (folder / name).write_text("canary")
    for name in ("runs/events.out.tfevents.1", ".ipynb_checkpoints/config-checkpoint.json", ".git/config"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("canary")
    (folder / "link.json").symlink_to(outside)
    (folder / "additional_chat_templates").symlink_to(tmp_path)
    output, _ = export(folder)
    clean, _ = export(LLAMA.checkpoint)
    assert sorted(path.name for path in output.rglob("*")) == sorted(path.name for path in clean.rglob("*"))
    assert not any(b"canary" in path.read_bytes() for path in output.iterdir())
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    (folder / "special_tokens_map.json").symlink_to(outside)
    with pytest.raises(CheckpointError, match="leaves the checkpoint folder"):
        export(folder)


# A folder that was exported before


@pytest.fixture
def hub() -> Iterator[RehearsalHub]:
    with RehearsalHub(organizations=["Org"]) as running:
        yield running


@pytest.fixture
def folder(export: Export) -> Path:
    return export(LLAMA.checkpoint, hf_repo_name=NAME, no_publish=True, verify="files")[0]


def enter_in_manifest(folder: Path, path: str, content: bytes) -> None:
    """Make ``path`` a file of the export, as an older version of this program might have."""
    import hashlib

    manifest = json.loads((folder / "export.json").read_text())
    kept = [entry for entry in manifest["files"] if entry["path"] != path]
    entry = {"path": path, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "export.json").write_text(json.dumps(manifest | {"files": [*kept, entry]}))


def publish(folder: Path, hub: RehearsalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
    run_publish(PublishOptions(folder, auth_token=hub.token), Report(), Console(quiet=True))


def test_publish_refuses_a_credential_in_an_old_folder(
    folder: Path, hub: RehearsalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = (folder / "README.md").read_bytes() + PLANTED["aws id"].encode()
    (folder / "README.md").write_bytes(content)
    enter_in_manifest(folder, "README.md", content)
    with pytest.raises(RefusedError, match=r"README\.md holds an AWS access key"):
        publish(folder, hub, monkeypatch)
    assert hub.requests == []


def test_publish_sends_nothing_from_outside_of_the_folder(
    folder: Path, hub: RehearsalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder.parent / "outside").write_bytes(b"canary")
    manifest = (folder / "export.json").read_bytes()
    enter_in_manifest(folder, "../outside", b"canary")
    with pytest.raises(VerificationError, match="not a manifest"):
        publish(folder, hub, monkeypatch)
    (folder / "export.json").write_bytes(manifest)
    enter_in_manifest(folder, "notes.txt", b"canary")
    (folder / "notes.txt").symlink_to(folder.parent / "outside")
    with pytest.raises(CheckpointError, match="symbolic link"):
        publish(folder, hub, monkeypatch)
    assert hub.requests == []


# The token of a run


def run(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """The program as a job runs it: without a login of its own, and with a stdin that nobody answers."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "GITHUB_", "EXPORT_"))}
    return subprocess.run(
        [sys.executable, "-m", "exporter", *arguments],
        cwd=ROOT,
        env=clean | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def endings(hub: RehearsalHub, folder: Path) -> dict[str, tuple[int, list[str], str]]:
    """Ways to end: exit code, options, token."""
    bad, reader = f"hf_{letters(34)}", hub.add_token(role="read")
    expired = hub.add_token(expired=True)
    publish = ["publish", str(folder)]
    return {
        "published": (0, publish, hub.token),
        "unchanged": (0, [*publish, "--json"], hub.token),
        "a bad token": (6, publish, bad),
        "an expired token": (6, publish, expired),
        "a token that may only read": (6, publish, reader),
        "a name that is the token": (2, [*publish, "--hf_repo_name", hub.token], hub.token),
        "a message that is the token": (4, [*publish, "--commit_message", f"by {hub.token}"], hub.token),
        "a token with a line end": (6, publish, f"{bad}\n{bad}"),
        "no such folder": (2, ["publish", f"/nowhere/{bad}"], bad),
    }


@pytest.mark.parametrize("way", ["HF_TOKEN", "EXPORT_MODEL_AUTH_TOKEN", "--auth_token"])
def test_no_ending_shows_the_token_even_in_debug_mode(
    way: str, folder: Path, hub: RehearsalHub, tmp_path: Path
) -> None:
    report, outputs, summary = (tmp_path / name for name in ("report.json", "outputs", "summary.md"))
    environment = {"HF_ENDPOINT": hub.endpoint, "EXPORT_MODEL_DEBUG": "1", "HF_DEBUG": "1", "HF_HOME": str(tmp_path)}
    environment |= {"GITHUB_OUTPUT": str(outputs), "GITHUB_STEP_SUMMARY": str(summary)}
    for ending, (code, arguments, token) in endings(hub, folder).items():
        if way != "HF_TOKEN" and ending not in ("published", "a bad token", "a name that is the token"):
            continue
        given = {} if way == "--auth_token" else {way: token}
        options = ["--auth_token", token] if way == "--auth_token" else []
        finished = run([*arguments, *options, "--report", str(report)], **environment, **given)
        assert finished.returncode == code, (ending, finished.stderr)
        shown = [finished.stdout, finished.stderr, *(path.read_text() for path in (report, outputs, summary))]
        for part in token.split():
            assert not any(part in text for text in shown), ending
        warnings = finished.stderr.count("--auth_token can be read by other users")
        assert warnings == (way == "--auth_token"), ending


def test_nothing_is_asked_on_stdin(tmp_path: Path) -> None:
    """Nor is an answer taken that nobody asked for: the libraries would ask whether to run the checkpoint's code."""
    folder = Case("custom-zero2").copy(tmp_path)
    code = next(folder.glob("modeling_*.py"))
    code.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n{code.read_text()}")
    read, write = os.pipe()
    os.write(write, b"y\n" * 5)
    subprocess.run(
        [sys.executable, "-m", "exporter", "export", str(folder), "--rehearse", "--prompt_format", "none"],
        cwd=ROOT,
        stdin=read,
        capture_output=True,
        timeout=120,
        check=False,
    )
    os.close(write)
    with os.fdopen(read, "rb") as unread:
        assert unread.read() == b"y\n" * 5
    assert not (tmp_path / "ran").exists()


def test_a_bug_does_not_show_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    from exporter.cli import ending

    token = "canary-bird-of-another-form"
    with pytest.raises(SystemExit) as ended, ending(tmp_path / "report.json", True, token):
        raise ArithmeticError(f"Bearer {token} and {PLANTED['hub']}")
    assert ended.value.code == 1
    stdout, stderr = capfd.readouterr()
    assert "Traceback" in stderr and "ArithmeticError" in stdout
    for text in (stdout, stderr, (tmp_path / "report.json").read_text()):
        assert token not in text
        assert PLANTED["hub"] not in text


def test_every_credential_of_a_text_is_cut_out_wherever_it_stands() -> None:
    planted = [f"gho_{letters(36)}", f"ghp_{letters(36)}", PLANTED["hub"]]
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        told = redact(" then ".join(planted[number] for number in order))
        assert told == " then ".join(["<redacted>"] * 3)


@pytest.mark.parametrize("text", ["\ud800", "\udcff", "a\udc80b"])
def test_text_that_no_file_can_hold_does_not_disturb_the_telling(text: str, tmp_path: Path) -> None:
    assert redact(text, [f"hf_{text}"]) == text
    report = Report()
    report.fail(3, "checkpoint", text, "")
    report.write(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["error"]["message"] == text
