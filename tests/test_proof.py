"""An exported folder is proven again: what was changed in it, or does not come from the checkpoint, is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exporter.console import Console
from exporter.errors import UsageError, VerificationError
from exporter.proof import ProofOptions, run_verify
from exporter.report import Report
from exporter.verify import check_loads
from tests.conftest import Case

Export = Callable[..., tuple[Path, dict[str, Any]]]


def prove(folder: Path, **options: Any) -> dict[str, Any]:
    report = Report()
    run_verify(ProofOptions(folder, **options), report, Console(quiet=True))
    return report.as_dict()


@pytest.mark.parametrize("name", ["llama-zero3", "mixtral-zero2", "falcon-bin-sharded", "llama-zero2-fp16"])
def test_a_healthy_export_is_proven_against_its_checkpoint(name: str, export: Export) -> None:
    checkpoint = Case(name).checkpoint
    folder, _ = export(checkpoint, max_shard_size=8000)
    report = prove(folder, checkpoint=checkpoint, load=True)
    assert report["status"] == "verified"
    assert [(check["name"], check["status"]) for check in report["checks"]] == [
        ("files", "passed"),
        ("source", "passed"),
        ("load", "passed"),
    ]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "README.md"])
def test_a_changed_file_is_found(name: str, export: Export) -> None:
    folder, _ = export(Case("llama-zero3").checkpoint)
    content = bytearray((folder / name).read_bytes())
    content[-2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(VerificationError, match=name):
        prove(folder)


def test_a_missing_and_an_added_file_are_found(export: Export) -> None:
    folder, _ = export(Case("llama-zero3").checkpoint)
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"old")
    with pytest.raises(VerificationError, match="model-00001-of-00002"):
        prove(folder)
    (folder / "model-00001-of-00002.safetensors").unlink()
    (folder / "config.json").unlink()
    with pytest.raises(VerificationError, match="config"):
        prove(folder)


def test_weights_of_another_checkpoint_are_found_although_the_manifest_agrees(export: Export) -> None:
    folder, _ = export(Case("llama-zero3").checkpoint)
    with pytest.raises(VerificationError, match="differs from the checkpoint"):
        prove(folder, checkpoint=Case("llama-trainer-zero3").checkpoint, tag=None)


def test_a_folder_that_was_not_exported_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match=r"export\.json"):
        prove(tmp_path)
    with pytest.raises(UsageError):
        prove(tmp_path / "absent")


@pytest.mark.parametrize(("name", "content"), [("config.json", b"{}"), ("model.safetensors", b"\xff" * 9)])
def test_whatever_keeps_an_export_from_loading_fails_the_verification(
    name: str, content: bytes, export: Export, tmp_path: Path
) -> None:
    folder, _ = export(Case("llama-zero3").checkpoint)
    if name == "config.json":
        config = json.loads((folder / name).read_text())
        content = json.dumps(config | {"num_attention_heads": 0}).encode()
    (folder / name).write_bytes(content)
    with pytest.raises(VerificationError, match="transformers cannot load the export"):
        check_loads(folder, "Hello", trust_remote_code=False)


@pytest.mark.parametrize(
    ("key", "value"),
    [("dtype", "int8"), ("weights", "foo"), ("weights", []), ("max_shard_size", []), ("max_shard_size", 1e999)],
)
def test_a_manifest_that_does_not_say_how_it_was_made_is_no_proof(key: str, value: object, export: Export) -> None:
    checkpoint = Case("llama-zero3").checkpoint
    folder, _ = export(checkpoint)
    manifest = json.loads((folder / "export.json").read_text())
    manifest["source" if key == "weights" else "options"][key] = value
    (folder / "export.json").write_text(json.dumps(manifest))
    with pytest.raises(VerificationError, match="does not say how the export was made"):
        prove(folder, checkpoint=checkpoint)
