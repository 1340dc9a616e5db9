"""Adapters that PEFT wrote, merged: equal to PEFT's own merge into the fp32 model, refused where it is undefined."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from exporter.checkpoints import open_checkpoint
from exporter.checkpoints.lora import LoraTensor
from exporter.checkpoints.safetensors_file import read_safetensors_file
from exporter.console import Console
from exporter.errors import CheckpointError, ExportError, RefusedError, UsageError, VerificationError
from exporter.hub import HubAccess
from exporter.inspection import run_inspect
from exporter.proof import ProofOptions, run_verify
from exporter.rehearsal import RehearsalHub
from exporter.report import Report
from exporter.source import open_model
from exporter.tensors import SourceFiles
from tests.conftest import CHECKPOINTS, Case
from tests.test_export import interrupt
from tests.test_source import use

LLAMA, GPT2 = Case("llama-safetensors"), Case("gpt2-safetensors")
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"
Export = Callable[..., tuple[Path, dict[str, Any]]]
State = dict[str, torch.Tensor]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


def base_model(base: Path, rows: int | None = None) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def write_adapter(folder: Path, base: Path = LLAMA.checkpoint, rows: int | None = None, **options: Any) -> Path:
    """A LoRA adapter on ``base`` with random values for all that is trained, saved by PEFT."""
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"]}
    model = peft.get_peft_model(base_model(base, rows), peft.LoraConfig(**settings | options))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.05
    model.save_pretrained(folder)
    return folder


def merged_by_peft(adapter: Path, base: Path = LLAMA.checkpoint, rows: int | None = None) -> State:
    """PEFT's own merge into the fp32 model."""
    model = peft.PeftModel.from_pretrained(base_model(base, rows), adapter)
    state: State = model.merge_and_unload().state_dict()
    return state


def exported(folder: Path) -> State:
    """The exported model, loaded with transformers."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    state: State = model.state_dict()
    return state


def assert_same(found: State, expected: State, dtype: torch.dtype = torch.float32) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype is dtype, name
        assert torch.equal(found[name], value.to(dtype)), name


KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"down_proj": 8}, "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 3}},
    "dora": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["lm_head", "norm"]},
    "trained tokens": {"trainable_token_indices": {"embed_tokens": [280, 5]}},
    "embedding": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_equals_pefts_own_fp32_merge_bit_for_bit(kind: str, tmp_path: Path, export: Export) -> None:
    adapter = write_adapter(tmp_path / "adapter", **KINDS[kind])
    folder, report = export(adapter, prompt_format="none", dtype="fp32")
    truth = merged_by_peft(adapter)
    assert_same(exported(folder), truth)
    assert report["checkpoint"]["format"] == "adapter"
    folder, _ = export(adapter, prompt_format="none")
    assert_same(exported(folder), truth, torch.bfloat16)


@pytest.mark.parametrize("options", [{}, {"bias": "all"}, {"lora_bias": True}, {"use_dora": True}], ids=str)
def test_the_conv1d_of_gpt2_is_merged_transposed(options: dict[str, Any], tmp_path: Path, export: Export) -> None:
    adapter = write_adapter(tmp_path / "adapter", GPT2.checkpoint, target_modules=["c_attn", "c_proj"], **options)
    folder, _ = export(adapter, prompt_format="none", dtype="fp32")
    truth, found = merged_by_peft(adapter, GPT2.checkpoint), exported(folder)
    if "use_dora" not in options:
        assert_same(found, truth)
    for name, value in truth.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=0, msg=name)


def test_a_square_weight_that_may_be_transposed_or_not_is_refused(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", GPT2.checkpoint, target_modules=["c_attn", "c_proj"])
    configure(adapter, fan_in_fan_out=False)
    with pytest.raises(RefusedError, match=r"whether transformer\.h\.0\.attn\.c_proj\.weight is transposed"):
        open_model(adapter, None, None, HubAccess(), Console(quiet=True))


def test_files_of_a_base_without_the_prefix_in_memory_are_matched(tmp_path: Path, export: Export) -> None:
    base = GPT2.copy(tmp_path)
    weights = load_file(base / "model.safetensors")
    save_file({name.removeprefix("transformer."): value for name, value in weights.items()}, base / "model.safetensors")
    adapter = write_adapter(tmp_path / "adapter", GPT2.checkpoint, target_modules=["c_attn"])
    folder, _ = export(adapter, prompt_format="none", dtype="fp32", base_model=str(base))
    assert_same(exported(folder), merged_by_peft(adapter, GPT2.checkpoint))


def test_an_adapter_that_was_trained_without_the_head_is_matched(tmp_path: Path, export: Export) -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(
        transformers.AutoModel.from_pretrained(LLAMA.checkpoint), peft.LoraConfig(target_modules=["q_proj"])
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    model.save_pretrained(tmp_path / "adapter")
    folder, _ = export(tmp_path / "adapter", prompt_format="none", dtype="fp32")
    found = exported(folder)
    for name, value in model.merge_and_unload().state_dict().items():
        assert torch.equal(found[f"model.{name}"], value), name


def test_added_tokens_come_with_an_embedding_of_more_rows(tmp_path: Path, export: Export) -> None:
    adapter = write_adapter(tmp_path / "adapter", rows=300)
    folder, report = export(adapter, prompt_format="none", dtype="fp32")
    assert_same(exported(folder), merged_by_peft(adapter, rows=300))
    assert report["vocabulary"]["rows"] == json.loads((folder / "config.json").read_text())["vocab_size"] == 300


def test_all_of_it_is_the_same_from_a_torch_file(tmp_path: Path, export: Export) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    truth = merged_by_peft(adapter)
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    folder, _ = export(adapter, prompt_format="none", dtype="fp32")
    assert_same(exported(folder), truth)


def test_a_bf16_base_is_merged_in_fp32_and_rounded_once(tmp_path: Path, export: Export) -> None:
    base = LLAMA.copy(tmp_path)
    transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    adapter = write_adapter(tmp_path / "adapter", base)
    truth = merged_by_peft(adapter, base)
    for dtype in ("keep", "bf16"):
        folder, report = export(adapter, prompt_format="none", dtype=dtype)
        assert report["output"]["dtype"] == "bf16"
        assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
        assert_same(exported(folder), truth, torch.bfloat16)


def test_new_tokens_of_the_export_grow_the_merged_embedding(tmp_path: Path, export: Export) -> None:
    adapter = write_adapter(tmp_path / "adapter", **KINDS["embedding"])
    folder, report = export(adapter, dtype="fp32")
    assert report["vocabulary"]["added"] == ["<|prompter|>", "<|assistant|>"]
    found, truth = exported(folder), merged_by_peft(adapter)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(found[name][: len(truth[name])], truth[name])
        mean = truth[name].double().mean(dim=0).float()
        assert torch.equal(found[name][len(truth[name]) :], mean.expand(len(found[name]) - len(truth[name]), -1))


def test_tokens_trained_alone_stay_tied_to_the_head(tmp_path: Path, export: Export) -> None:
    adapter = write_adapter(
        tmp_path / "adapter", GPT2.checkpoint, target_modules=["c_attn"], trainable_token_indices=[280, 5]
    )
    folder, _ = export(adapter, prompt_format="none", dtype="fp32")
    assert_same(exported(folder), merged_by_peft(adapter, GPT2.checkpoint))
    ids = torch.tensor([[5, 280, 7]])
    live = peft.PeftModel.from_pretrained(base_model(GPT2.checkpoint), adapter)
    with torch.no_grad():
        found = transformers.AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        torch.testing.assert_close(found, live(ids).logits, rtol=1e-4, atol=1e-5)


def test_the_merge_is_said_and_can_be_proven_again(tmp_path: Path, export: Export) -> None:
    adapter = write_adapter(tmp_path / "adapter", target_modules=["q_proj"])
    folder, report = export(adapter)
    checks = {check["name"]: check["detail"] for check in report["checks"]}
    assert checks["merge"] == "the adapter is merged into 2 tensors, in fp32, each cast once"
    manifest = json.loads((folder / "export.json").read_text())
    files = [file["path"] for file in manifest["source"]["files"]]
    assert files == ["adapter_model.safetensors", "base/model.safetensors"]
    assert not any(str(tmp_path) in path.read_text() for path in folder.glob("*.*") if path.suffix != ".safetensors")
    run_verify(ProofOptions(folder, adapter, load=True), Report(), Console(quiet=True))
    configure(adapter, base_model_name_or_path="gone")
    run_verify(ProofOptions(folder, adapter, base_model=str(LLAMA.checkpoint)), Report(), Console(quiet=True))
    configure(adapter, base_model_name_or_path=str(LLAMA.checkpoint))
    change(adapter, lambda tensors: tensors[f"{Q_PROJ}.lora_B.weight"].mul_(2))
    with pytest.raises(VerificationError, match=r"q_proj\.weight differs"):
        run_verify(ProofOptions(folder, adapter), Report(), Console(quiet=True))


def test_inspect_needs_no_base(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", target_modules=["q_proj"])
    configure(adapter, base_model_name_or_path="nobody/has-this")
    report = Report()
    run_inspect(adapter, None, HubAccess(), report, Console(quiet=True))
    assert report.checkpoint["format"] == "adapter"
    assert report.checkpoint["parameters"] == 2 * (4 * 16 + 16 * 4)


def test_the_base_comes_from_the_hub_at_its_revision(
    tmp_path: Path, export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = write_adapter(tmp_path / "adapter", LLAMA.checkpoint)
    with RehearsalHub(organizations=["org"]) as hub:
        api = huggingface_hub.HfApi(hub.endpoint, token=hub.token)
        api.create_repo("org/base")
        commit = api.upload_folder(repo_id="org/base", folder_path=LLAMA.checkpoint).oid
        api.upload_file(repo_id="org/base", path_in_repo="config.json", path_or_fileobj=b"{}")
        configure(adapter, base_model_name_or_path="org/base", revision=commit)
        use(hub, monkeypatch)
        folder, report = export(adapter, prompt_format="none", dtype="fp32", cache_dir=tmp_path / "cache")
    assert report["checkpoint"]["base_model"] == f"org/base@{commit}"
    assert "base_model: org/base\n" in (folder / "README.md").read_text()
    configure(adapter, base_model_name_or_path=str(LLAMA.checkpoint))
    assert_same(exported(folder), merged_by_peft(adapter))


def test_the_trainers_checkpoint_of_an_adapter_is_merged(tmp_path: Path, export: Export) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(LLAMA.checkpoint, pad_token="<|endoftext|>")
    model = peft.get_peft_model(base_model(LLAMA.checkpoint), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    ids = tokenizer("What is the capital of France?")["input_ids"]
    arguments = transformers.TrainingArguments(
        tmp_path / "run", max_steps=2, save_steps=2, learning_rate=0.1, report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = transformers.Trainer(
        model, arguments, train_dataset=[{"input_ids": ids, "labels": ids}] * 8, processing_class=tokenizer
    )
    trainer.train()
    folder, report = export(tmp_path / "run", prompt_format="none", dtype="fp32")
    assert report["checkpoint"]["format"] == "adapter"
    assert report["vocabulary"]["pad_token"] == "<|endoftext|>"
    assert_same(exported(folder), model.merge_and_unload().state_dict())


def configure(adapter: Path, **settings: Any) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | settings))


def change(adapter: Path, edit: Callable[[State], Any]) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")


def zero(tensors: State) -> None:
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor.zero_()


def rename(tensors: State) -> None:
    tensors[f"{Q_PROJ}x.lora_A.weight"] = tensors.pop(f"{Q_PROJ}.lora_A.weight")
    tensors[f"{Q_PROJ}x.lora_B.weight"] = tensors.pop(f"{Q_PROJ}.lora_B.weight")


def set_tensor(name: str, *shape: int) -> Callable[[State], None]:
    return lambda tensors: tensors.update({f"{Q_PROJ}{name}": torch.randn(shape)})


DAMAGES: dict[str, tuple[Callable[[State], Any], type[ExportError], str]] = {
    "untrained": (zero, RefusedError, "changes nothing"),
    "matches nothing": (rename, CheckpointError, r"q_projx\.weight, which the base model does not have"),
    "whole tensor of no place": (set_tensor("x.bias", 16), CheckpointError, r"q_projx\.bias, which the base"),
    "half a pair": (
        lambda tensors: tensors.pop(f"{Q_PROJ}.lora_B.weight"),
        CheckpointError,
        r"has lora_A.weight of model.layers.0.self_attn.q_proj, and not all",
    ),
    "unknown part": (set_tensor(".lora_C.weight", 4, 4), CheckpointError, r"lora_C\.weight, which the base"),
    "another shape": (set_tensor(".lora_A.weight", 4, 17), CheckpointError, r"for a weight of \[16, 17\]"),
    "not gathered": (set_tensor(".lora_A.weight", 0), CheckpointError, r"lora_A, of shape \[0\]"),
    "magnitude without dora": (set_tensor(".lora_magnitude_vector", 16), CheckpointError, "against use_dora"),
    "two names for one": (
        lambda tensors: tensors.update(
            {f"{Q_PROJ}.weight": torch.ones(16, 16), f"{Q_PROJ}.base_layer.weight": torch.zeros(16, 16)}
        ),
        CheckpointError,
        "another value of it under another name",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_adapter_that_is_not_the_bases_is_refused(damage: str, tmp_path: Path) -> None:
    edit, error, message = DAMAGES[damage]
    adapter = write_adapter(tmp_path / "adapter")
    change(adapter, edit)
    with pytest.raises(error, match=message):
        open_model(adapter, None, None, HubAccess(), Console(quiet=True))


SETTINGS: list[tuple[dict[str, Any], type[ExportError], str]] = [
    ({"peft_type": "IA3"}, RefusedError, "type 'IA3' is not merged"),
    ({"layer_replication": [[0, 2], [1, 2]]}, RefusedError, "sets layer_replication"),
    ({"target_parameters": ["mlp.experts.gate_up_proj"]}, RefusedError, "sets target_parameters"),
    ({"of_the_future": True}, RefusedError, "sets of_the_future"),
    ({"init_lora_weights": "pissa"}, RefusedError, "init_lora_weights 'pissa' changed the base"),
    ({"task_type": "SEQ_CLS"}, RefusedError, "head for SEQ_CLS, and the base model is LlamaForCausalLM"),
    ({"r": 5}, CheckpointError, "factors of rank 4, and the adapter's config says 5"),
    ({"lora_alpha": None}, CheckpointError, "lora_alpha is None"),
    ({"rank_pattern": {"(": 1}}, CheckpointError, "rank_pattern is broken"),
    ({"rank_pattern": {"a{99999999999999999999}": 1}}, CheckpointError, "rank_pattern is broken"),
    ({"lora_alpha": 10**400}, CheckpointError, "lora_alpha is 1000"),
    ({"use_dora": True}, CheckpointError, "no lora_magnitude_vector"),
    ({"base_model_name_or_path": None}, CheckpointError, "names no base model"),
    ({"base_model_name_or_path": "x" * 600}, CheckpointError, "is not here"),
    ({"base_model_name_or_path": str(CHECKPOINTS)}, CheckpointError, "'checkpoints' is not here"),
    ({"base_model_name_or_path": "/nowhere/at/all"}, CheckpointError, "base model 'all' is not here"),
]


@pytest.mark.parametrize(("settings", "error", "message"), SETTINGS, ids=[str(case[0]) for case in SETTINGS])
def test_settings_that_cannot_be_merged_are_refused(
    settings: dict[str, Any], error: type[ExportError], message: str, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    configure(adapter, **settings)
    with pytest.raises(error, match=message):
        open_model(adapter, None, None, HubAccess(), Console(quiet=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["c_attn", "wte"]}, "factors for transformer.wte.weight, which the base"),
        ({"target_modules": ["c_attn", "wte"], "ensure_weight_tying": True}, "factors for transformer.wte.weight"),
        ({"target_modules": ["c_attn", "lm_head"]}, "factors for lm_head.weight, which the base"),
    ],
    ids=str,
)
def test_a_change_of_one_of_two_tied_tensors_is_refused(
    options: dict[str, Any], message: str, tmp_path: Path, export: Export
) -> None:
    adapter = write_adapter(tmp_path / "adapter", GPT2.checkpoint, **{"target_modules": ["c_attn"]} | options)
    with pytest.raises(RefusedError, match=message):
        export(adapter)


@pytest.mark.parametrize("rows", [None, 300])
@pytest.mark.parametrize("modules", [["wte", "lm_head"], ["wte"], ["lm_head"]], ids=str)
def test_whole_modules_untie_the_head(modules: list[str], rows: int | None, tmp_path: Path, export: Export) -> None:
    adapter = write_adapter(
        tmp_path / "adapter", GPT2.checkpoint, rows, target_modules=["c_attn"], modules_to_save=modules
    )
    folder, _ = export(adapter, prompt_format="none", dtype="fp32")
    assert_same(exported(folder), merged_by_peft(adapter, GPT2.checkpoint, rows))
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_resized_embedding_stays_tied(tmp_path: Path, export: Export) -> None:
    adapter = write_adapter(tmp_path / "adapter", GPT2.checkpoint, rows=300, target_modules=["c_attn"])
    folder, report = export(adapter, prompt_format="none", dtype="fp32")
    assert_same(exported(folder), merged_by_peft(adapter, GPT2.checkpoint, rows=300))
    assert report["tensors"]["tied"] == {"lm_head.weight": "transformer.wte.weight"}


def test_a_quantized_base_is_refused(tmp_path: Path) -> None:
    base = LLAMA.copy(tmp_path)
    adapter = write_adapter(tmp_path / "adapter", base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    with pytest.raises(RefusedError, match="quantization_config"):
        open_model(adapter, None, None, HubAccess(), Console(quiet=True))


def test_an_adapter_beside_a_models_weights_is_refused(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    shutil.copy(LLAMA.checkpoint / "model.safetensors", adapter)
    with pytest.raises(RefusedError, match="either may be what was trained"):
        open_checkpoint(adapter)


def test_the_base_is_not_written_over(tmp_path: Path, export: Export) -> None:
    base = LLAMA.copy(tmp_path)
    (base / "export.json").write_text("{}")
    adapter = write_adapter(tmp_path / "adapter", base)
    with pytest.raises(UsageError, match="inside one another"):
        export(adapter, output_folder=base, overwrite=True)


@pytest.mark.parametrize("threads", [1, 2])
def test_blocks_of_rows_are_the_whole_product(threads: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {"w": torch.randn(1000, 4096), "a": torch.randn(12, 4096), "b": torch.randn(1000, 12)}
    save_file(tensors, tmp_path / "x.safetensors")
    lazy = read_safetensors_file(tmp_path / "x.safetensors")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with SourceFiles() as files:
            merged = LoraTensor(lazy["w"], lazy["a"], lazy["b"], 0.75, transposed=False)
            blocks = [block.clone() for block in merged.blocks(files)]
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert len(blocks) > 1
    assert torch.equal(torch.cat(blocks).view(1000, 4096), tensors["w"] + tensors["b"] @ tensors["a"] * 0.75)


_MEASURE = """
import sys, threading, time
from pathlib import Path
from exporter.console import Console
from exporter.export import run_export
from exporter.options import Options
from exporter.report import Report

def watch():
    while True:
        status = Path("/proc/self/status").read_text()
        peaks.append(int(status.partition("RssAnon:")[2].split()[0]))
        time.sleep(0.02)

peaks = []
threading.Thread(target=watch, daemon=True).start()
run_export(Options(Path(sys.argv[1]), output_folder=Path(sys.argv[2]), jobs=2), Report(), Console(quiet=True))
print(max(peaks) // 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_merge_into_a_large_base_takes_the_memory_of_a_few_blocks(tmp_path: Path) -> None:
    base = LLAMA.copy(tmp_path)
    shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4, "head_dim": 1024}
    config = transformers.AutoConfig.from_pretrained(base, **shape)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(base)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapter = write_adapter(tmp_path / "adapter", base, r=64, target_modules=targets)
    assert (base / "model.safetensors").stat().st_size > 900_000_000
    run = subprocess.run(
        [sys.executable, "-c", _MEASURE, adapter, tmp_path / "export"], check=True, stdout=subprocess.PIPE, text=True
    )
    assert int(run.stdout) < 700, run.stdout


def test_a_merge_with_other_settings_is_not_taken_over(
    tmp_path: Path, export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    interrupt(monkeypatch, export, adapter, prompt_format="none", output_folder=tmp_path / "out")
    configure(adapter, lora_alpha=64)
    folder, _ = export(adapter, prompt_format="none", output_folder=tmp_path / "out")
    assert_same(exported(folder), merged_by_peft(adapter), torch.bfloat16)
