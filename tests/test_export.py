"""Exports of real checkpoints equal the live model, bit for bit, and load with every weight in its place."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from exporter.card import extract_sample_code
from exporter.checkpoints import open_checkpoint
from exporter.errors import CheckpointError, OutputError, RefusedError, UsageError
from exporter.hub import OutgoingFile, Push
from exporter.rehearsal import RehearsalHub
from exporter.tensors import DType
from tests.conftest import ALL_CASES, ZERO_CASES, Case
from tests.test_zero import edit

Export = Callable[..., tuple[Path, dict[str, Any]]]
PROGRAM = Path(__file__).parent.parent / "export_model.py"
FALCON = Case("falcon-trainer-zero2")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def load(folder: Path) -> Any:
    """The exported model, loaded with transformers without a missing, unexpected or newly initialized weight."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", trust_remote_code=True, output_loading_info=True
    )
    assert not any(info.values()), info
    return model


def expected(case: Case, name: str, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A true weight as it is exported."""
    if not value.is_floating_point():
        return value
    kept = name.startswith("gate.") and case.name.startswith("custom") and dtype is not torch.float32
    return value.to(torch.float32 if kept else dtype)


def assert_equals_truth(case: Case, folder: Path, dtype: torch.dtype) -> None:
    state = load(folder).state_dict()
    truth = case.truth
    truth |= {alias: truth[name] for alias, name in case.facts["tied"].items() if name in truth}
    assert state.keys() == truth.keys()
    for name, value in truth.items():
        wanted = expected(case, name, value, dtype)
        assert state[name].dtype is wanted.dtype, name
        old = state[name][: len(wanted)] if wanted.dim() else state[name]
        assert torch.equal(old, wanted), name


@pytest.mark.parametrize("case", ALL_CASES, ids=lambda case: case.name)
def test_an_export_equals_the_live_model_cast_to_bf16(case: Case, export: Export) -> None:
    folder, report = export(case.checkpoint, trust_remote_code=True, prompt_format="none")
    assert_equals_truth(case, folder, torch.bfloat16)
    facts = case.facts
    assert report["checkpoint"]["format"] == facts["format"]
    if facts["format"] == "zero":
        assert {key: report["checkpoint"][key] for key in ("zero_stage", "world_size", "tag", "step")} == {
            key: facts[key] for key in ("zero_stage", "world_size", "tag", "step")
        }


@pytest.mark.parametrize("case", ZERO_CASES, ids=lambda case: case.name)
def test_master_weights_equal_the_live_model_in_fp32(case: Case, export: Export) -> None:
    folder, report = export(
        case.checkpoint, trust_remote_code=True, prompt_format="none", dtype="fp32", weights="master"
    )
    assert report["checkpoint"]["weights"] == "master"
    assert_equals_truth(case, folder, torch.float32)


def test_fp16_keeps_the_modules_that_the_class_keeps_in_fp32(export: Export) -> None:
    case = Case("custom-zero2")
    folder, report = export(case.checkpoint, trust_remote_code=True, prompt_format="none", dtype="fp16")
    assert_equals_truth(case, folder, torch.float16)
    assert report["tensors"]["kept"] == {"gate.bias": "F32", "gate.weight": "F32", "token_count": "I64"}


def test_keep_writes_the_models_own_dtype(export: Export) -> None:
    folder, report = export(Case("llama-zero2-fp16").checkpoint, dtype="keep")
    assert report["output"]["dtype"] == "fp16"
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float16"
    assert {tensor.dtype for tensor in load(folder).state_dict().values()} == {torch.float16}


def test_a_mixture_of_experts_gives_the_logits_of_the_live_model(export: Export) -> None:
    for name in ("mixtral-zero2", "mixtral-zero3"):
        case = Case(name)
        folder, _ = export(case.checkpoint, prompt_format="none", dtype="fp32", weights="master")
        saved = load_file(case.checkpoint.parent / "logits.safetensors")
        with torch.no_grad():
            found = load(folder)(input_ids=saved["input_ids"]).logits
        torch.testing.assert_close(found, saved["logits"], rtol=1e-4, atol=1e-5)
        assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in load_file(folder / "model.safetensors")


def test_a_gpt_neox_head_has_its_name_on_disk(export: Export) -> None:
    folder, _ = export(Case("neox-zero2").checkpoint)
    assert "embed_out.weight" in load_file(folder / "model.safetensors")


def test_new_rows_are_the_mean_of_the_old_ones(export: Export) -> None:
    case = Case("llama-zero3")
    folder, report = export(case.checkpoint, dtype="fp32")
    assert report["vocabulary"]["rows"] % 16 == 0
    assert report["vocabulary"]["added"] == ["<|prompter|>", "<|assistant|>"]
    state = load(folder).state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        old = case.truth[name]
        assert len(state[name]) == report["vocabulary"]["rows"] > len(old)
        assert torch.equal(state[name][: len(old)], old)
        mean = old.to(torch.float64).mean(dim=0).to(torch.float32)
        assert all(torch.equal(row, mean) for row in state[name][len(old) :])


def test_a_tensor_that_cannot_grow_with_the_vocabulary_is_refused(export: Export) -> None:
    with pytest.raises(RefusedError, match="token_count"):
        export(Case("custom-zero2").checkpoint, trust_remote_code=True, prompt_format="oasst")


@pytest.mark.parametrize(
    "body",
    [
        pytest.param("raise NotImplementedError", id="as the library says it"),
        pytest.param("return self.lm_head.get_input_embeddings()", id="it asks a part that has none"),
    ],
)
def test_tokens_are_added_only_where_the_class_says_what_the_embedding_is(
    body: str, export: Export, tmp_path: Path
) -> None:
    checkpoint = Case("custom-zero2").copy(tmp_path / "copy")
    code = (checkpoint / "modeling_tiny.py").read_text()
    getter = "def get_input_embeddings(self) -> nn.Module:\n        "
    assert f"{getter}return self.embed" in code
    (checkpoint / "modeling_tiny.py").write_text(code.replace(f"{getter}return self.embed", getter + body))
    with pytest.raises(RefusedError, match="does not say which tensor its input embedding is"):
        export(checkpoint, trust_remote_code=True, prompt_format="oasst")
    _, report = export(checkpoint, trust_remote_code=True, prompt_format="none")
    assert report["vocabulary"]["rows"] is None


def test_more_layers_than_tensors_are_refused_before_they_are_built(export: Export, tmp_path: Path) -> None:
    checkpoint = Case("llama-zero3").copy(tmp_path / "copy")
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**9}))
    with pytest.raises(CheckpointError, match=r"num_hidden_layers 1e\+09, but the checkpoint has 21 tensors"):
        export(checkpoint)


def test_the_tokenizer_of_another_model_is_refused(export: Export, tmp_path: Path) -> None:
    checkpoint = Case("llama-zero3").copy(tmp_path / "copy")
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {f"token{number}": number for number in range(1000, 1010)}
    (checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(RefusedError, match=r"has 1010 tokens .* it is not the tokenizer of this model"):
        export(checkpoint)


def test_an_eos_token_that_the_model_has_no_row_for_is_refused(export: Export, tmp_path: Path) -> None:
    checkpoint = Case("llama-zero3").copy(tmp_path / "copy")
    config = json.loads((checkpoint / "tokenizer_config.json").read_text())
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<|endoftexu|>"}))
    with pytest.raises(CheckpointError, match=r"'<\|endoftexu\|>' has the id \d+, but model\.embed_tokens\.weight has"):
        export(checkpoint)


def test_shards_stay_below_the_size_header_included_and_load(export: Export) -> None:
    case = Case("llama-zero2")
    folder, report = export(case.checkpoint, max_shard_size=8000, prompt_format="none")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) == report["output"]["shards"] > 2
    assert all(path.stat().st_size <= 8000 for path in shards if len(load_file(path)) > 1)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == report["output"]["total_size"]
    assert index["weight_map"] == {name: path.name for path in shards for name in load_file(path)}
    assert_equals_truth(case, folder, torch.bfloat16)


def test_the_same_checkpoint_and_options_give_the_same_bytes(export: Export) -> None:
    first, _ = export(Case("llama-zero3").checkpoint, max_shard_size=8000, jobs=1)
    second, _ = export(Case("llama-zero3").checkpoint, max_shard_size=8000, jobs=4)
    assert contents(first) == contents(second)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_config_tokenizer_and_generation_config_agree(export: Export) -> None:
    folder, report = export(FALCON.checkpoint)
    config = json.loads((folder / "config.json").read_text())
    generation = json.loads((folder / "generation_config.json").read_text())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert config["eos_token_id"] == generation["eos_token_id"] == tokenizer.eos_token_id
    assert config["vocab_size"] == report["vocabulary"]["rows"] >= len(tokenizer)
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi?"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt == "<|prompter|>Hi?<|endoftext|><|assistant|>"


def test_a_run_folder_means_its_newest_complete_checkpoint(export: Export, tmp_path: Path) -> None:
    run = FALCON.copy(tmp_path / "run")
    assert export(run)[1]["checkpoint"]["tag"] == "global_step1000"
    (run / "checkpoint-1000" / "latest").unlink()
    next(run.glob("checkpoint-1000/global_step1000/mp_rank_00_model_states.pt")).unlink()
    (run / "checkpoint-1000" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError):
        export(run / "checkpoint-1000")
    shard = next(run.glob("checkpoint-500/global_step500/*rank_1*"))
    assert export(run)[1]["checkpoint"]["tag"] == "global_step500"
    shard.unlink()
    with pytest.raises(CheckpointError, match="rank"):
        export(run)


def test_a_file_that_cannot_be_read_does_not_make_an_older_checkpoint_the_newest(
    export: Export, tmp_path: Path
) -> None:
    for step in (1, 2):
        shutil.copytree(Case("llama-zero3").checkpoint, tmp_path / "run" / f"checkpoint-{step}")
    (shard,) = (tmp_path / "run" / "checkpoint-2").glob("*/*_rank_1_*_optim_states.pt")
    shard.unlink()
    shard.symlink_to(shard.name)
    with pytest.raises(CheckpointError, match="Too many levels of symbolic links"):
        export(tmp_path / "run")


def test_custom_code_is_neither_imported_nor_exported_without_the_flag(export: Export, tmp_path: Path) -> None:
    checkpoint = Case("custom-zero2").copy(tmp_path / "copy")
    canary = tmp_path / "canary"
    (checkpoint / "zero_to_fp32.py").write_text("# as DeepSpeed leaves it beside the weights")
    for path in checkpoint.glob("*_tiny.py"):
        path.write_text(path.read_text() + f"\nopen({str(canary)!r}, 'w').close()\n")
    with pytest.raises(RefusedError, match="own code"):
        export(checkpoint, prompt_format="none")
    assert not canary.exists()
    folder, _ = export(checkpoint, prompt_format="none", trust_remote_code=True)
    assert canary.exists()
    assert {path.name for path in folder.glob("*.py")} == {"configuration_tiny.py", "modeling_tiny.py"}


def test_values_that_are_not_finite_are_refused_with_their_names(export: Export, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    checkpoint = Case("llama-safetensors").copy(tmp_path / "copy")
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    weights["lm_head.weight"][0, 0] = 1e30
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RefusedError, match=r"model\.norm\.weight \(1 in the checkpoint\)"):
        export(checkpoint)
    with pytest.raises(RefusedError, match=r"lm_head\.weight \(1 overflow in the cast\)"):
        export(checkpoint, dtype="fp16", prompt_format="none")
    folder, _ = export(checkpoint, allow_nonfinite=True)
    assert torch.isnan(load(folder).state_dict()["model.norm.weight"][0])


@pytest.mark.parametrize("name", ["llama-zero1", "neox-zero2", "llama-trainer-zero3-gathered"])
def test_master_weights_of_another_step_are_refused_by_the_models_own_copy(
    name: str, export: Export, tmp_path: Path
) -> None:
    checkpoint = Case(name).copy(tmp_path / "copy")
    shard = sorted(checkpoint.rglob("*optim_states.pt"))[-1]

    def change(state: dict[str, Any]) -> None:
        for key in ("single_partition_of_fp32_groups", "fp32_flat_groups"):
            for group in state["optimizer_state_dict"].get(key, []):
                group.data += 0.5

    edit(shard, change)
    with pytest.raises(CheckpointError, match="is not what the model's own copy says"):
        export(checkpoint, weights="master")


def test_a_gathered_copy_of_another_save_is_refused(export: Export, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    checkpoint = Case("llama-trainer-zero3-gathered").copy(tmp_path / "copy")
    (path,) = checkpoint.rglob("model.safetensors")
    save_file({name: value + 1 for name, value in load_file(path).items()}, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="is not what the model's own copy says"):
        export(checkpoint)


def test_a_tag_is_found_in_an_older_checkpoint_of_a_run(export: Export) -> None:
    assert export(FALCON.checkpoint, tag="global_step500")[1]["checkpoint"]["step"] == 500


def test_a_flipped_bit_in_a_partition_is_refused_by_its_checksum(export: Export, tmp_path: Path) -> None:
    checkpoint = Case("llama-zero3").copy(tmp_path / "copy")
    shard = sorted(checkpoint.rglob("*rank_1*optim_states.pt"))[0]
    content = bytearray(shard.read_bytes())
    part = next(iter(open_checkpoint(checkpoint).master.values())).extents[-1]  # type: ignore[union-attr]
    content[part.offset] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{shard.name} is damaged: the CRC-32"):
        export(checkpoint)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_tied_names_with_different_values_are_exported_untied(export: Export, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    checkpoint = Case("gpt2-safetensors").copy(tmp_path / "copy")
    weights = load_file(checkpoint / "model.safetensors")
    weights["lm_head.weight"] = weights["transformer.wte.weight"] + 1
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    folder, report = export(checkpoint, dtype="keep")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    assert report["tensors"]["tied"] == {}
    loaded = load(folder).state_dict()
    rows = weights["lm_head.weight"].shape[0]
    assert torch.equal(loaded["lm_head.weight"][:rows], weights["lm_head.weight"])
    assert torch.equal(loaded["transformer.wte.weight"][:rows], weights["transformer.wte.weight"])


def test_an_output_folder_is_replaced_only_when_told_to(export: Export, tmp_path: Path) -> None:
    checkpoint = Case("llama-safetensors").checkpoint
    folder, _ = export(checkpoint)
    before = contents(folder)
    with pytest.raises(OutputError, match="holds an earlier export"):
        export(checkpoint, output_folder=folder, dtype="fp32")
    assert contents(folder) == before
    export(checkpoint, output_folder=folder, dtype="fp32", overwrite=True)
    assert contents(folder) != before
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="no earlier export"):
        export(checkpoint, output_folder=foreign, overwrite=True)
    assert contents(foreign) == {"thesis.txt": b"mine"}
    with pytest.raises(UsageError):
        export(checkpoint, output_folder=checkpoint / "inside")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_dry_run_writes_nothing(export: Export, tmp_path: Path) -> None:
    folder, report = export(FALCON.checkpoint, dry_run=True)
    assert report["status"] == "planned"
    assert report["output"]["total_size"] > 0
    assert list(tmp_path.iterdir()) == []
    assert not folder.exists()


# The command itself, against a Hub


def run(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], env=os.environ | environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("transport", ["xet", "lfs"])
def test_the_line_of_the_readme_publishes_a_model_whose_sample_code_runs(transport: str, tmp_path: Path) -> None:
    name = "OpenAssistant/falcon-7b-sft-top1"
    with RehearsalHub(organizations=["OpenAssistant"], xet=transport == "xet") as hub:
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}
        line = ["--dtype", "bf16", "--hf_repo_name", name, "--trust_remote_code", "--auth_token", hub.token]
        line += [str(FALCON.checkpoint), "--max_shard_size", "2GB"]
        finished = run([str(PROGRAM), *line, "--report", str(tmp_path / "report.json")], environment)
        assert finished.returncode == 0, finished.stderr
        report = json.loads((tmp_path / "report.json").read_text())
        assert report["status"] == "published"
        assert report["hub"]["transport"] in (transport, None)
        assert finished.stdout.splitlines()[-1] == report["hub"]["url"]
        assert [commit.title for commit in hub.repositories[name].history("main")] == [
            "Publish falcon-7b-sft-top1",
            "initial commit",
        ]
        assert hub.repositories[name].private
        assert "%" not in finished.stderr
        card = hub.read(name, "README.md").decode()
        assert f"python export_model.py --dtype bf16 --hf_repo_name {name} --trust_remote_code --auth_token" in card
        assert "--auth_token <auth_token> <output_path> --max_shard_size 2GB" in card
        for text in (finished.stdout, finished.stderr, json.dumps(report), card):
            assert hub.token not in text
        code = extract_sample_code(card)
        assert code is not None
        answer = run(["-c", code], environment | {"HF_TOKEN": hub.token})
        assert answer.returncode == 0, answer.stderr
        assert answer.stdout.startswith("Result: ")

        again = run([str(PROGRAM), *line, "--json"], environment)
        assert json.loads(again.stdout)["status"] == "unchanged"
        assert len(hub.repositories[name].history("main")) == 2

        folder = tmp_path / "folder"
        kept = run([str(PROGRAM), *line, "--no_publish", "--output_folder", str(folder)], environment)
        assert kept.returncode == 0, kept.stderr
        published = hub.repositories[name].resolve("main").tree
        assert contents(folder) == {path: hub.read(name, path) for path in published if path != ".gitattributes"}


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_shard_makes_room_once_it_is_sent(
    jobs: int, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged, real = [], Push.send_ahead

    def counting(push: Push, file: OutgoingFile) -> bool:
        staged.append(len(list(file.source.parent.glob("*.safetensors"))))
        return real(push, file)

    monkeypatch.setattr(Push, "send_ahead", counting)
    monkeypatch.setattr("exporter.writer.SENT_TOGETHER", 0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    checkpoint, options = Case("llama-zero2").checkpoint, {"max_shard_size": 4000, "jobs": jobs}
    with RehearsalHub(organizations=["Org"]) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_TOKEN", hub.token)
        export(checkpoint, output_folder=None, hf_repo_name="Org/m", **options)
        assert len(staged) == 6 and max(staged) <= jobs + 1
        assert list(tmp_path.glob("export-model-*")) == []
        folder, _ = export(checkpoint, hf_repo_name="Org/m", no_publish=True, **options)
        assert {path.name: hub.read("Org/m", path.name) for path in folder.iterdir()} == contents(folder)


def test_the_same_export_may_go_to_two_hubs_at_once(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Push.commit
    to_model = functools.partial(export, Case("llama-zero2").checkpoint, output_folder=None, hf_repo_name="Org/m")

    def commit_to_both(push: Push, *arguments: Any) -> Any:
        monkeypatch.setattr(Push, "commit", real)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", other.endpoint)
        to_model(auth_token=other.token)
        return real(push, *arguments)

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with RehearsalHub(organizations=["Org"]) as hub, RehearsalHub(organizations=["Org"]) as other:
        monkeypatch.setattr(Push, "commit", commit_to_both)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        to_model(auth_token=hub.token)
        assert [len(each.repositories["Org/m"].history("main")) for each in (hub, other)] == [2, 2]


def test_a_dry_run_without_a_token_does_without_the_hub_and_a_bad_token_is_told(tmp_path: Path) -> None:
    with RehearsalHub(organizations=["Org"]) as hub:
        line = [str(PROGRAM), "--dry_run", "--hf_repo_name", "Org/name", str(Case("llama-zero3").checkpoint)]
        home = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": ""}
        assert run(line, home).returncode == 0
        bad = run([*line, "--auth_token", "hf_wrong"], home)
        assert (bad.returncode, bad.stdout) == (6, "")
        assert "hf_wrong" not in bad.stderr
        assert run([*line, "--auth_token", hub.token], home).returncode == 0
        assert hub.repositories == {}


def test_a_rehearsal_needs_no_token_and_no_network(tmp_path: Path) -> None:
    home = {
        "HF_HOME": str(tmp_path),
        "HF_TOKEN": "",
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HTTP_PROXY": "http://127.0.0.1:9",
    }
    finished = run([str(PROGRAM), "--rehearse", str(Case("llama-zero3").checkpoint), "--json"], home)
    assert finished.returncode == 0, finished.stderr
    assert "%" not in finished.stderr
    report = json.loads(finished.stdout)
    assert report["status"] == "rehearsed"
    assert [check["status"] for check in report["checks"]] == ["passed"] * 4


def test_the_report_spells_dtypes_as_safetensors_does(export: Export) -> None:
    _, report = export(Case("llama-zero3").checkpoint, dry_run=True)
    assert report["checkpoint"]["dtypes"] == {DType.F32.name: 21}


def interrupt(monkeypatch: pytest.MonkeyPatch, export: Export, checkpoint: Path, **options: Any) -> None:
    """An export that is stopped when all its shards are on the disk."""

    def stop(_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("exporter.writer.check_members", stop)
        export(checkpoint, **options)


def test_other_weights_of_the_same_file_are_not_taken_over(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, options = Case("tiny-stage0-bf16"), {"dtype": "fp32", "output_folder": tmp_path / "out"}
    interrupt(monkeypatch, export, case.checkpoint, weights="model", **options)
    folder, _ = export(case.checkpoint, weights="master", **options)
    fresh, _ = export(case.checkpoint, weights="master", dtype="fp32")
    assert contents(folder) == contents(fresh)


def test_an_export_goes_on_when_its_checkpoint_was_moved(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case("tiny-stage0-bf16")
    interrupt(monkeypatch, export, case.copy(tmp_path), output_folder=tmp_path / "out")
    moved = (tmp_path / "checkpoint").rename(tmp_path / "moved")
    monkeypatch.setattr("exporter.writer.write_shard", None)  # every shard is there
    folder, _ = export(moved, output_folder=tmp_path / "out")
    assert_equals_truth(case, folder, torch.bfloat16)


@pytest.mark.parametrize("file", ["generation_config.json", "preprocessor_config.json", "tokenizer_config.json"])
def test_json_with_too_many_values_within_one_another_is_refused(file: str, export: Export, tmp_path: Path) -> None:
    checkpoint = Case("tiny-stage0-bf16").copy(tmp_path)
    (checkpoint / file).write_text('{"a": ' + "[" * 600 + "]" * 600 + "}")
    with pytest.raises(CheckpointError, match=rf"^{file} is not valid JSON: it has more than 100 values within"):
        export(checkpoint)
