"""The options of Open-Assistant's export script give what that script gives: the weights, config and class."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner

from exporter.checkpoints import open_checkpoint
from exporter.cli import export as export_command
from exporter.console import Console
from exporter.errors import CheckpointError, RefusedError, UsageError, VerificationError
from exporter.proof import ProofOptions, run_verify
from exporter.report import Report
from tests.conftest import Case

Export = Callable[..., tuple[Path, dict[str, Any]]]

BASE = Case("llama-safetensors")
NEOX = Case("neox-zero2")
ROWS = 304
"""Rows of the embedding after the reinforcement learning: more than BASE has."""


def edit_config(folder: Path, **changes: Any) -> Path:
    """Change config.json; None removes a key."""
    config = json.loads((folder / "config.json").read_text()) | changes
    text = json.dumps({key: value for key, value in config.items() if value is not None})
    (folder / "config.json").write_text(text)
    return folder


def with_tokenizer(model: Any, folder: Path) -> Path:
    """The model as ``save_pretrained`` writes it, beside a tokenizer."""
    model.save_pretrained(folder)
    for path in BASE.checkpoint.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


# --rl_checkpoint


def trained_policy() -> Any:
    """The model of BASE with other weights and more rows, as it is after the training."""
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(BASE.checkpoint)
    model.resize_token_embeddings(ROWS)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def with_value_head(policy: Any) -> dict[str, torch.Tensor]:
    """The state dict of trlX's policy: the model's, and the value head's."""
    head = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
    return {**policy.state_dict(), **{f"v_head.{name}": tensor for name, tensor in head.state_dict().items()}}


WAYS: dict[str, Callable[[Mapping[str, torch.Tensor]], Any]] = {
    "module": lambda state: {"module": state, "global_steps": 7},
    "state dict alone": lambda state: state,
    "of a wrapped model": lambda state: {"module": {f"module.{name}": tensor for name, tensor in state.items()}},
}


@pytest.mark.parametrize("way", WAYS)
def test_an_rl_checkpoint_gives_the_weights_of_the_policy(way: str, tmp_path: Path, export: Export) -> None:
    policy = trained_policy()
    torch.save(WAYS[way](with_value_head(policy)), tmp_path / "mp_rank_00_model_states.pt")
    folder, report = export(
        BASE.checkpoint, rl_checkpoint=tmp_path / "mp_rank_00_model_states.pt", dtype="fp32", prompt_format="none"
    )
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    state = loaded.state_dict()
    assert state.keys() == policy.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in policy.state_dict().items())
    assert loaded.config.vocab_size == ROWS
    prefix = "module." if way == "of a wrapped model" else ""
    names = [f"{prefix}v_head.{part}.{name}" for part in (0, 2) for name in ("weight", "bias")]
    assert report["tensors"]["dropped"] == dict.fromkeys(names, "value head of the reinforcement learning")
    manifest = json.loads((folder / "export.json").read_text())
    assert [file["path"] for file in manifest["source"]["files"]] == ["mp_rank_00_model_states.pt"]
    assert manifest["options"]["rl_checkpoint"] == "mp_rank_00_model_states.pt"


def test_an_export_of_an_rl_checkpoint_is_proven_against_it(tmp_path: Path, export: Export) -> None:
    file, other = tmp_path / "rl.pt", tmp_path / "other.pt"
    state = with_value_head(trained_policy())
    torch.save({"module": state}, file)
    torch.save({"module": state | {"model.norm.weight": state["model.norm.weight"] + 1}}, other)
    folder, _ = export(BASE.checkpoint, rl_checkpoint=file)

    def verify(rl_checkpoint: Path | None) -> None:
        options = ProofOptions(folder, BASE.checkpoint, rl_checkpoint=rl_checkpoint)
        run_verify(options, Report(), Console(quiet=True))

    verify(file)
    with pytest.raises(VerificationError, match=r"model\.norm\.weight differs from the checkpoint"):
        verify(other)
    with pytest.raises(UsageError, match=r"made with --rl_checkpoint rl\.pt"):
        verify(None)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"module": None}, "holds no state dict"),
        ([1], "holds no state dict"),
        ({"module": {"a": torch.ones(1), "model.norm.weight": torch.ones(16)}}, r"20 missing .*; 1 unexpected \(a\)"),
        ({"module": {"a": torch.ones(1), "v_head.1.weight": torch.ones(1)}}, r"2 unexpected \(a, v_head"),
    ],
)
def test_an_rl_checkpoint_that_is_not_the_model_is_refused(
    value: Any, message: str, tmp_path: Path, export: Export
) -> None:
    torch.save(value, tmp_path / "rl.pt")
    with pytest.raises(CheckpointError, match=message):
        export(BASE.checkpoint, rl_checkpoint=tmp_path / "rl.pt")


def test_the_output_folder_may_not_hold_the_rl_checkpoint(tmp_path: Path, export: Export) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "export.json").write_text("{}")
    torch.save({}, tmp_path / "out" / "rl.pt")
    with pytest.raises(UsageError, match="inside one another"):
        export(
            BASE.checkpoint, rl_checkpoint=tmp_path / "out" / "rl.pt", output_folder=tmp_path / "out", overwrite=True
        )


# --reward_model


def reward_model(**changes: Any) -> Any:
    torch.manual_seed(2)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.GPTNeoXConfig(vocab_size=288, pad_token_id=0, num_labels=1, **sizes, **changes)
    return transformers.GPTNeoXForSequenceClassification(config).eval()


@pytest.mark.parametrize("architectures", [["GPTNeoXForSequenceClassification"], None])
def test_a_reward_model_gives_the_scores_that_transformers_gives(
    architectures: list[str] | None, tmp_path: Path, export: Export
) -> None:
    model = reward_model()
    checkpoint = edit_config(with_tokenizer(model, tmp_path / "reward"), architectures=architectures)
    folder, report = export(checkpoint, reward_model=True, dtype="fp32", verify="load", hf_repo_name=None)
    assert "runs" in report["checks"][-1]["detail"]
    loaded, info = transformers.AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    ids = torch.tensor([[7, 8, 9, 10], [11, 12, 0, 0]])
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(ids).logits, model(ids).logits, rtol=0, atol=1e-6)
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: text-classification\n" in card
    assert "conversational" not in card and "Prompting" not in card and "Sample Code" not in card
    assert report["vocabulary"]["added"] == []
    run_verify(ProofOptions(folder, checkpoint), Report(), Console(quiet=True))


OWN_CLASS = """
import torch
from transformers import GPTNeoXConfig, GPTNeoXModel, GPTNeoXPreTrainedModel


class RewardConfig(GPTNeoXConfig):
    model_type = "gpt_neox_reward_model"
    pooling: str = "last"


class GPTNeoXRewardModel(GPTNeoXPreTrainedModel):
    config_class = RewardConfig

    def __init__(self, config):
        super().__init__(config)
        self.gpt_neox = GPTNeoXModel(config)
        self.out_proj = torch.nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        hidden = self.gpt_neox(input_ids, attention_mask=attention_mask)[0]
        return self.out_proj(hidden[:, -1])
"""


def open_assistants(folder: Path) -> Path:
    """A reward model of Open-Assistant's own class: its backbone, and ``out_proj`` with a bias."""
    model = reward_model()
    checkpoint = with_tokenizer(model, folder)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("score")}
    (checkpoint / "model.safetensors").unlink()
    torch.save(
        state | {"out_proj.weight": torch.ones(1, 16), "out_proj.bias": torch.ones(1)}, folder / "pytorch_model.bin"
    )
    return edit_config(
        checkpoint, architectures=["GPTNeoXRewardModel"], model_type="gpt_neox_reward_model", pooling="last"
    )


def test_open_assistants_own_class_is_refused_without_its_code(tmp_path: Path, export: Export) -> None:
    with pytest.raises(RefusedError, match="GPTNeoXRewardModel is Open-Assistant's own class"):
        export(open_assistants(tmp_path / "reward"), reward_model=True, trust_remote_code=True)


def test_open_assistants_own_class_is_exported_with_its_code(tmp_path: Path, export: Export) -> None:
    checkpoint = open_assistants(tmp_path / "reward")
    (checkpoint / "reward.py").write_text(OWN_CLASS)
    classes = {
        "AutoConfig": "reward.RewardConfig",
        "AutoModelForSequenceClassification": "reward.GPTNeoXRewardModel",
    }
    edit_config(checkpoint, auto_map=classes)
    with pytest.raises(RefusedError, match="may not be imported"):
        export(checkpoint, reward_model=True)
    folder, report = export(checkpoint, reward_model=True, trust_remote_code=True, dtype="fp32", verify="load")
    assert report["checks"][-1]["detail"].endswith("runs")
    written = transformers.AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(written.out_proj.weight, torch.ones(1, 16))
    assert "pipeline_tag: text-classification\n" in (folder / "README.md").read_text()


def test_a_language_model_is_no_reward_model(export: Export) -> None:
    with pytest.raises(RefusedError, match="LlamaForCausalLM, which is no reward model") as refusal:
        export(BASE.checkpoint, reward_model=True)
    assert "LlamaForSequenceClassification" in refusal.value.hint


# --rope_scaling_type, --rope_scaling_factor


def scaled_by_the_script(checkpoint: Path, kind: str, factor: float) -> Any:
    """The model as Open-Assistant's script sets its scaling: in the config that it is then saved and loaded with."""
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    config.rope_scaling = {**config.rope_parameters, "rope_type": kind, "factor": factor}
    return transformers.AutoModelForCausalLM.from_pretrained(checkpoint, config=config, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    ("name", "kind"), [("llama-safetensors", "linear"), ("llama-safetensors", "dynamic"), ("falcon-bin", "linear")]
)
def test_a_scaled_model_gives_the_logits_of_the_same_scaling_in_transformers(
    name: str, kind: str, export: Export
) -> None:
    checkpoint = Case(name).checkpoint
    plain, _ = export(checkpoint, dtype="fp32", prompt_format="none")
    folder, _ = export(checkpoint, dtype="fp32", prompt_format="none", rope_scaling_type=kind, rope_scaling_factor=2.0)
    assert (folder / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_scaling"] == {"type": kind, "factor": 2.0}
    ids = torch.arange(200).reshape(1, -1) % 250
    models = [transformers.AutoModelForCausalLM.from_pretrained(path).eval() for path in (folder, plain)]
    with torch.no_grad():
        found, unscaled = (model(ids).logits for model in models)
        expected = scaled_by_the_script(checkpoint, kind, 2.0)(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found, unscaled, rtol=1e-3, atol=1e-4)


def test_a_neox_model_keeps_its_rotary_share_when_it_is_scaled(tmp_path: Path, export: Export) -> None:
    before = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}
    checkpoint = edit_config(NEOX.copy(tmp_path), rope_parameters=before, rope_theta=None, partial_rotary_factor=None)
    folder, _ = export(checkpoint, rope_scaling_factor=4.0)
    rope = transformers.AutoConfig.from_pretrained(folder).rope_parameters
    assert {key: rope[key] for key in (*before, "factor")} == before | {"rope_type": "linear", "factor": 4.0}
    config = json.loads((folder / "config.json").read_text())
    assert (config["rotary_emb_base"], config["rotary_pct"]) == (5000.0, 0.5)


def test_a_config_of_transformers_4_is_scaled_too(tmp_path: Path, export: Export) -> None:
    checkpoint = edit_config(BASE.copy(tmp_path), rope_parameters=None, rope_theta=5000.0)
    folder, _ = export(checkpoint, rope_scaling_factor=2.0)
    rope = transformers.AutoConfig.from_pretrained(folder).rope_parameters
    assert {key: rope[key] for key in ("rope_type", "factor", "rope_theta")} == {
        "rope_type": "linear",
        "factor": 2.0,
        "rope_theta": 5000.0,
    }


def test_a_model_without_a_rotary_embedding_is_not_scaled(tmp_path: Path, export: Export) -> None:
    with pytest.raises(RefusedError, match="GPT2LMHeadModel has no rotary embedding"):
        export(Case("gpt2-safetensors").checkpoint, rope_scaling_factor=2.0)
    alibi = edit_config(Case("falcon-bin").copy(tmp_path), alibi=True)
    with pytest.raises(RefusedError, match="FalconForCausalLM has no rotary embedding"):
        export(alibi, rope_scaling_factor=2.0)


def test_a_scaling_of_another_kind_is_not_replaced(tmp_path: Path, export: Export) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}
    checkpoint = edit_config(BASE.copy(tmp_path), rope_parameters=yarn)
    with pytest.raises(RefusedError, match="of its own \\(yarn\\)"):
        export(checkpoint, rope_scaling_factor=2.0)


# Usage


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rope_scaling_type", "linear"], "does nothing without a factor"),
        (["--rope_scaling_factor", "0.5"], "at least 1"),
        (["--rope-scaling-factor", "nan"], "at least 1"),
        (["--rope_scaling_type", "yarn", "--rope_scaling_factor", "2"], "yarn"),
        (["--reward_model", "--rl_checkpoint", __file__], "Give one of them"),
        (["--rl_checkpoint", "no-such-file"], "no-such-file"),
    ],
)
def test_options_that_mean_nothing_together_are_a_usage_error(options: list[str], message: str) -> None:
    result = CliRunner().invoke(export_command, ["--dry_run", str(BASE.checkpoint), *options])
    assert result.exit_code == 2
    assert message in result.output


def test_the_options_reach_the_card_without_a_local_path(tmp_path: Path) -> None:
    torch.save({"module": with_value_head(trained_policy())}, tmp_path / "rl.pt")
    output = tmp_path / "out"
    options = ["--rl_checkpoint", str(tmp_path / "rl.pt"), "--rope_scaling_factor", "2", "--output_folder", str(output)]
    result = CliRunner().invoke(export_command, [*options, str(BASE.checkpoint)])
    assert result.exit_code == 0, result.output
    card = (output / "README.md").read_text()
    assert "--rl_checkpoint rl.pt --rope_scaling_factor 2.0" in card
    assert open_checkpoint(output).format == "pretrained"
