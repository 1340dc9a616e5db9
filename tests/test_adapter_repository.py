"""Adapters exported as adapters: PEFT loads them onto the base to the model that was trained, and nothing else fits."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from exporter.card import extract_sample_code
from exporter.checkpoints.targets import is_target
from exporter.console import Console
from exporter.errors import CheckpointError, ExportError, RefusedError, UsageError, VerificationError
from exporter.hub import HubAccess
from exporter.proof import ProofOptions, run_verify
from exporter.rehearsal import RehearsalHub
from exporter.release import PublishOptions, run_publish
from exporter.report import Report
from tests.test_adapter import GPT2, LLAMA, Export, base_model, change, configure, write_adapter, zero
from tests.test_source import use

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

BASE = "org/base"
NAME = "org/adapter"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[RehearsalHub]:
    """A Hub with the base model."""
    with RehearsalHub(organizations=["org"]) as hub:
        upload(hub, LLAMA.checkpoint)
        use(hub, monkeypatch)
        yield hub


def upload(hub: RehearsalHub, folder: Path, name: str = BASE) -> str:
    api = huggingface_hub.HfApi(hub.endpoint, token=hub.token)
    api.create_repo(name, exist_ok=True)
    return str(api.upload_folder(repo_id=name, folder_path=folder).oid)


@pytest.fixture
def keep(tmp_path: Path, export: Export, hub: RehearsalHub) -> Export:
    """Exports an adapter as one, for the base on the Hub."""

    def run(adapter: Path, **options: Any) -> tuple[Path, dict[str, Any]]:
        given = {"keep_adapter": True, "base_model": BASE, "cache_dir": tmp_path / "cache", "dtype": "fp32"}
        return export(adapter, **given | options)

    return run


def prove(folder: Path, cache: Path, **options: Any) -> dict[str, str]:
    report = Report()
    run_verify(ProofOptions(folder, access=HubAccess(cache=cache), **options), report, Console(quiet=True))
    return {check.name: check.status for check in report.checks}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(torch.tensor([[5, 280, 7, 31]])).logits
    return found


KINDS: dict[str, tuple[int | None, dict[str, Any]]] = {
    "lora": (None, {}),
    "rslora of some layers": (None, {"use_rslora": True, "layers_to_transform": [1], "layers_pattern": "layers"}),
    "expression": (None, {"target_modules": r".*\.layers\.0\..*_proj"}),
    "dora": (None, {"use_dora": True}),
    "modules_to_save": (None, {"modules_to_save": ["lm_head", "norm"]}),
    "trained tokens": (None, {"trainable_token_indices": {"embed_tokens": [280, 5]}}),
    "embedding": (None, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "added tokens": (300, {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_it_onto_the_base_to_the_model_that_was_trained(kind: str, tmp_path: Path, keep: Export) -> None:
    rows, options = KINDS[kind]
    adapter = write_adapter(tmp_path / "adapter", rows=rows, **options)
    trained = logits(peft.PeftModel.from_pretrained(base_model(LLAMA.checkpoint, rows), adapter))
    folder, _ = keep(adapter, verify="load")
    found = logits(peft.PeftModel.from_pretrained(base_model(LLAMA.checkpoint, rows), folder))
    assert torch.equal(found, trained)
    assert not torch.equal(found, logits(base_model(LLAMA.checkpoint, rows)))
    assert prove(folder, tmp_path / "cache", checkpoint=adapter, load=True) == {
        "files": "passed",
        "source": "passed",
        "load": "passed",
    }


def test_the_folder_is_an_adapter_repository_that_names_its_base_at_its_commit(tmp_path: Path, keep: Export) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    configure(adapter, corda_config={"cache_file": str(tmp_path / "corda")}, inference_mode=False)
    folder, report = keep(adapter, dtype="bf16", hf_repo_name=NAME, no_publish=True)
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "export.json",
    ]
    before, after = (json.loads((place / "adapter_config.json").read_text()) for place in (adapter, folder))
    commit = report["checkpoint"]["base_model"].partition("@")[2]
    changed = {"base_model_name_or_path": BASE, "revision": commit, "inference_mode": True, "corda_config": {}}
    assert after == before | changed
    assert not any(str(tmp_path) in path.read_text() for path in folder.glob("*.*") if path.suffix != ".safetensors")
    saved = load_file(adapter / "adapter_model.safetensors")
    found = load_file(folder / "adapter_model.safetensors")
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[name], value.to(torch.bfloat16)) for name, value in saved.items())
    assert report["output"]["shards"] == 1
    assert report["tensors"]["written"] == report["tensors"]["cast"] == len(saved)
    card = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    assert (card["library_name"], card["base_model"], card["base_model_relation"]) == ("peft", BASE, "adapter")


def test_a_tokenizer_is_exported_where_the_adapter_has_one(tmp_path: Path, keep: Export) -> None:
    adapter = write_adapter(tmp_path / "adapter", rows=300)
    transformers.AutoTokenizer.from_pretrained(LLAMA.checkpoint).save_pretrained(adapter)
    folder, report = keep(adapter, prompt_format="oasst", verify="load")
    assert report["vocabulary"]["added"] == ["<|prompter|>", "<|assistant|>"]
    assert transformers.AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<|assistant|>") < 300


@pytest.mark.parametrize(("rows", "has_tokenizer"), [(None, False), (300, True)])
def test_the_sample_code_runs_as_printed(
    rows: int | None, has_tokenizer: bool, tmp_path: Path, keep: Export, hub: RehearsalHub
) -> None:
    adapter = write_adapter(tmp_path / "adapter", rows=rows)
    if has_tokenizer:
        transformers.AutoTokenizer.from_pretrained(LLAMA.checkpoint).save_pretrained(adapter)
    folder, _ = keep(adapter, hf_repo_name=NAME, no_publish=True, prompt_format="none")
    report = Report()
    run_publish(PublishOptions(folder, auth_token=hub.token, private=False), report, Console(quiet=True))
    assert report.status == "published"
    code = extract_sample_code((folder / "README.md").read_text())
    assert code
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": hub.token, "HF_HOME": str(tmp_path / "home"), "PATH": ""}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("Result: ")


def test_a_rehearsal_reads_it_back_and_loads_it(tmp_path: Path, keep: Export) -> None:
    _, report = keep(write_adapter(tmp_path / "adapter"), rehearse=True, hf_repo_name=NAME)
    assert report["status"] == "rehearsed"
    assert "PEFT loads it onto its base" in report["checks"][-1]["detail"]


def test_the_load_check_is_unavailable_without_the_base(tmp_path: Path, keep: Export) -> None:
    folder, _ = keep(write_adapter(tmp_path / "adapter"))
    assert prove(folder, tmp_path / "empty", load=True)["load"] == "unavailable"


def test_the_load_check_finds_what_peft_passes_over(tmp_path: Path, keep: Export) -> None:
    folder, _ = keep(write_adapter(tmp_path / "adapter"))
    configure(folder, target_modules=["q_proj"])
    update_manifest(folder, "adapter_config.json")
    with pytest.raises(VerificationError, match=r"PEFT does not place .*down_proj"):
        prove(folder, tmp_path / "cache", load=True)


def update_manifest(folder: Path, name: str) -> None:
    """What the manifest says of a file, as if it had been exported so."""
    content = (folder / name).read_bytes()
    manifest = json.loads((folder / "export.json").read_text())
    for file in manifest["files"]:
        if file["path"] == name:
            file |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "export.json").write_text(json.dumps(manifest))


def test_an_adapter_of_other_values_is_found(tmp_path: Path, keep: Export) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    folder, _ = keep(adapter)
    change(adapter, lambda tensors: next(iter(tensors.values())).mul_(2))
    with pytest.raises(VerificationError, match="differs from the checkpoint"):
        prove(folder, tmp_path / "cache", checkpoint=adapter)


def test_the_file_is_not_cut_and_its_size_is_told(
    tmp_path: Path, keep: Export, capsys: pytest.CaptureFixture[str]
) -> None:
    _, report = keep(write_adapter(tmp_path / "adapter"), max_shard_size=100)
    assert [file["path"] for file in report["output"]["files"]].count("adapter_model.safetensors") == 1
    assert "more than the shard size: an adapter is one file" in capsys.readouterr().err


REFUSALS: dict[str, tuple[Callable[[Path], Any], dict[str, Any], type[ExportError], str]] = {
    "local base": (lambda adapter: None, {"base_model": None}, RefusedError, "is not named as on the Hub"),
    "gone base": (
        lambda adapter: configure(adapter, base_model_name_or_path="/gone/base"),
        {"base_model": None},
        RefusedError,
        "'base', is not named as on the Hub",
    ),
    "base's own place": (lambda adapter: None, {"hf_repo_name": BASE, "no_publish": True}, UsageError, "base model"),
    "prompt without a tokenizer": (lambda adapter: None, {"prompt_format": "chatml"}, RefusedError, "no tokenizer"),
    "untrained": (lambda adapter: change(adapter, zero), {}, RefusedError, "changes nothing"),
    "another rank": (lambda adapter: configure(adapter, r=5), {}, CheckpointError, "rank 4"),
    "no target": (
        lambda adapter: configure(adapter, target_modules=["q_proj"]),
        {},
        CheckpointError,
        r"factors of model\.layers\.0\.mlp\.down_proj, which target_modules",
    ),
    "broken targets": (lambda adapter: configure(adapter, target_modules="("), {}, CheckpointError, "is broken"),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_what_nobody_could_load_is_refused(refusal: str, tmp_path: Path, keep: Export) -> None:
    damage, options, error, message = REFUSALS[refusal]
    adapter = write_adapter(tmp_path / "adapter")
    damage(adapter)
    with pytest.raises(error, match=message):
        keep(adapter, **options)


def test_tokens_that_need_rows_of_the_base_are_refused(tmp_path: Path, keep: Export) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    transformers.AutoTokenizer.from_pretrained(LLAMA.checkpoint).save_pretrained(adapter)
    with pytest.raises(RefusedError, match="cannot make its base model's embedding larger") as refusal:
        keep(adapter, special_tokens=tuple(f"<{number}>" for number in range(40)))
    assert "--prompt_format none" in refusal.value.hint


def test_an_adapter_trained_without_the_head_is_refused(tmp_path: Path, keep: Export) -> None:
    model = peft.get_peft_model(
        transformers.AutoModel.from_pretrained(LLAMA.checkpoint), peft.LoraConfig(target_modules=["q_proj"])
    )
    for parameter in model.parameters():
        parameter.data.normal_()
    model.save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(RefusedError, match="without its head"):
        keep(tmp_path / "adapter")


def test_a_model_is_no_adapter(keep: Export) -> None:
    with pytest.raises(UsageError, match="holds a model and no adapter"):
        keep(LLAMA.checkpoint)


def test_the_conv1d_of_gpt2_is_kept(tmp_path: Path, keep: Export, hub: RehearsalHub) -> None:
    upload(hub, GPT2.checkpoint, "org/gpt2")
    adapter = write_adapter(tmp_path / "adapter", GPT2.checkpoint, target_modules=["c_attn", "c_proj"])
    folder, _ = keep(adapter, base_model="org/gpt2", verify="load")
    assert torch.equal(
        logits(peft.PeftModel.from_pretrained(base_model(GPT2.checkpoint), folder)),
        logits(peft.PeftModel.from_pretrained(base_model(GPT2.checkpoint), adapter)),
    )


SETTINGS: list[dict[str, Any]] = [
    {"target_modules": ["q_proj", "mlp.down_proj"]},
    {"target_modules": ["model.layers.1.mlp.down_proj"]},
    {"target_modules": ["proj"]},
    {"target_modules": r".*\.1\..*(q|down)_proj"},
    {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["blocks"]},
    {"target_modules": ["q_proj", "down_proj", "lm_head"], "exclude_modules": ["layers.0.mlp.down_proj"]},
    {"target_modules": ["q_proj", "lm_head"], "exclude_modules": ".*q_proj"},
    {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head", "self_attn"]},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_modules_with_factors_are_those_that_peft_takes(settings: dict[str, Any]) -> None:
    from peft.tuners.tuners_utils import check_target_module_exists

    config = peft.LoraConfig(**settings)
    saved = json.loads(json.dumps(config.to_dict(), default=sorted))
    names = [name for name, _ in base_model(LLAMA.checkpoint).named_modules() if name]
    expected = {name for name in names if check_target_module_exists(config, name)}
    assert {name for name in names if is_target(saved, name)} == expected
