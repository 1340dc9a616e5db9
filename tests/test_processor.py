"""Models that are more than causal language models, saved by transformers, exported, and loaded again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

from exporter.processor import read_processor
from tests.conftest import Case

Export = Callable[..., tuple[Path, dict[str, Any]]]

TOKENS = 281
"""Tokens of the tokenizer."""

_SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_LLAMA = {**_SMALL, "vocab_size": 320, "num_key_value_heads": 1, "max_position_embeddings": 256, "pad_token_id": 0}
_PIXELS = torch.linspace(-1, 1, 3 * 8 * 8).reshape(1, 3, 8, 8)
TEMPLATE = "{% for message in messages %}USER: {{ message['content'] }}\n{% endfor %}ASSISTANT:"


def saved(model: Any, folder: Path) -> Path:
    """The model as ``save_pretrained`` writes it, beside a tokenizer."""
    model.save_pretrained(folder)
    for path in Case("llama-safetensors").checkpoint.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


def llava() -> Any:
    vision = {**_SMALL, "image_size": 8, "patch_size": 4, "projection_dim": 16}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision),
        text_config=transformers.LlamaConfig(**_LLAMA),
        image_token_index=TOKENS,
        image_seq_length=4,
    )
    return transformers.LlavaForConditionalGeneration(config)


def t5() -> Any:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    special = {"pad_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 0}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=320, **sizes, **special))


def reward() -> Any:
    return transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**_LLAMA, num_labels=1))


def bart_classifier() -> Any:
    layers = {f"{part}_{key}": 2 for part in ("encoder", "decoder") for key in ("layers", "attention_heads")}
    sizes = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 256}
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "decoder_start_token_id": 0}
    config = transformers.BartConfig(vocab_size=320, num_labels=3, **layers, **sizes, **special)
    return transformers.BartForSequenceClassification(config)


_TEXT = {"input_ids": torch.tensor([[7, 8, 9, 0]])}
_IMAGE = {"input_ids": torch.tensor([[7, *[TOKENS] * 4, 9]]), "pixel_values": _PIXELS}
KINDS: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "image-text-to-text": (llava, _IMAGE, "generates"),
    "encoder-decoder": (t5, {**_TEXT, "decoder_input_ids": torch.tensor([[0, 5]])}, "generates"),
    "text-classification": (reward, _TEXT, "runs"),
    "encoder-decoder classifier": (bart_classifier, _TEXT, "runs"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_another_kind_gives_the_same_outputs_after_its_export(
    kind: str, tmp_path: Path, export: Export
) -> None:
    make, inputs, done = KINDS[kind]
    torch.manual_seed(0)
    model = make().eval()
    folder, report = export(saved(model, tmp_path / "model"), dtype="fp32", prompt_format="none", verify="load")
    assert done in report["checks"][-1]["detail"]
    assert kind.startswith("encoder-decoder") or f"pipeline_tag: {kind}\n" in (folder / "README.md").read_text()
    loaded, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    state = loaded.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    with torch.no_grad():  # the kernels round as the weights lie in memory
        torch.testing.assert_close(loaded.eval()(**inputs).logits, model(**inputs).logits, rtol=0, atol=1e-7)


def test_a_vision_language_model_grows_with_its_tokens(tmp_path: Path, export: Export) -> None:
    model = llava()
    tokens = [f"<|token-{number}|>" for number in range(50)]
    folder, report = export(saved(model, tmp_path / "model"), dtype="bf16", special_tokens=tuple(tokens))
    rows = report["vocabulary"]["rows"]
    assert rows % 16 == 0 and rows >= TOKENS + len(tokens)
    config = json.loads((folder / "config.json").read_text())
    assert config["text_config"]["vocab_size"] == rows
    assert config["image_token_index"] == TOKENS
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
    assert loaded.get_input_embeddings().weight.shape[0] == loaded.lm_head.weight.shape[0] == rows


def test_the_processor_and_its_template_are_published(tmp_path: Path, export: Export) -> None:
    checkpoint = saved(llava(), tmp_path / "model")
    image = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 8}, "_name_or_path": "/home/me"}
    (checkpoint / "preprocessor_config.json").write_text(json.dumps(image))
    video = '{"video_processor_type":  "X"}'
    (checkpoint / "video_preprocessor_config.json").write_text(video)
    processor = {"processor_class": "LlavaProcessor", "patch_size": 4, "auto_map": {"AutoProcessor": "a/b--own.X"}}
    (checkpoint / "processor_config.json").write_text(json.dumps(processor))
    (checkpoint / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    (checkpoint / "own.py").write_text("class X: ...\n")
    folder, report = export(checkpoint)
    assert report["vocabulary"]["prompt_format"] == "own"
    assert json.loads((folder / "processor_config.json").read_text()) == processor | {
        "auto_map": {"AutoProcessor": "own.X"}
    }
    assert json.loads((folder / "preprocessor_config.json").read_text()) == {
        key: value for key, value in image.items() if key != "_name_or_path"
    }
    assert (folder / "video_preprocessor_config.json").read_text() == video
    assert (folder / "chat_template.jinja").read_text() == TEMPLATE
    assert (folder / "own.py").read_text() == "class X: ...\n"
    assert not (folder / "chat_template.json").exists()
    kwargs: dict[str, Any] = transformers.ProcessorMixin.get_processor_dict(folder)[0]
    assert kwargs["chat_template"] == TEMPLATE
    assert transformers.AutoTokenizer.from_pretrained(folder).chat_template == TEMPLATE


def test_a_processor_that_transformers_saved_prepares_the_same_inputs(tmp_path: Path, export: Export) -> None:
    checkpoint = saved(llava(), tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    square = {"height": 8, "width": 8}
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size=square, crop_size=square),
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    processor.save_pretrained(checkpoint)
    folder, report = export(checkpoint, verify="load")
    assert report["checks"][-1]["detail"].endswith("its processor loads")
    loaded = transformers.AutoProcessor.from_pretrained(folder)
    assert loaded.chat_template == TEMPLATE
    request = {"text": "USER: <image> hi", "images": Image.new("RGB", (9, 9), (200, 30, 10)), "return_tensors": "pt"}
    expected, inputs = processor(**request), loaded(**request)
    assert expected.keys() == inputs.keys() and "pixel_values" in inputs
    assert all(torch.equal(inputs[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["processor_config.json", "chat_template.json"])
def test_a_template_of_the_processors_goes_before_that_of_the_tokenizer(name: str, tmp_path: Path) -> None:
    from exporter.tokenizer import settle_vocabulary

    for path in Case("llama-safetensors").checkpoint.glob("tokenizer*"):
        shutil.copy(path, tmp_path)
    (tmp_path / "chat_template.jinja").write_text("not this")
    (tmp_path / name).write_text(json.dumps({"chat_template": TEMPLATE}))
    known = transformers.ProcessorMixin.get_processor_dict(tmp_path)[0]["chat_template"]
    settled = settle_vocabulary(tmp_path, prompt_format="auto", config={}, generation_config=None)
    assert settled.chat_template == known == TEMPLATE
    assert b"chat_template" not in read_processor(tmp_path).get(name, b"")
