"""Paths of one machine do not reach the readers of another; other texts with slashes stay as they are."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exporter.local_paths import is_local_path, without_local_paths
from tests.conftest import Case

Export = Callable[..., tuple[Path, dict[str, Any]]]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("train.py --output_dir /data/me/run --cfg=/home/me/x.yaml", "train.py --output_dir run --cfg=x.yaml"),
        ('output_dir: "/home/my user/run"', 'output_dir: "run"'),
        ("[/home/me/a, ~/b/c, ~me/d]", "[a, c, d]"),
        ("file:///data/x C:\\Users\\me\\run 'C:\\My Files\\run'", "x run 'run'"),
        ("PATH=/usr/bin:/opt/x/bin docker run -v /data/a:/mnt/b/", "PATH=bin:bin docker run -v a:b"),
    ],
)
def test_of_a_local_path_the_last_name_is_shown(text: str, shown: str) -> None:
    assert without_local_paths(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/a/b s3://bucket/a/b git@example.org:a/b",
        "OpenAssistant/oasst1 configs/zero_config.json ../x/y ./a/b out/run",
        "</s> <|/a/b|> /no_think 1/2 and/or $HOME/x/y",
    ],
)
def test_urls_hub_ids_relative_paths_and_tokens_stay(text: str) -> None:
    assert without_local_paths(text) == text


@pytest.mark.parametrize("value", ["/data/x", "~/x", "file:///a/b", "C:\\a\\b", "/home/my user/run", "/data/run/"])
def test_a_value_that_is_a_path_is_known(value: str) -> None:
    assert is_local_path(value)


@pytest.mark.parametrize("value", ["</s>", "/", "a/b", "", None, 7, "see /data/x", "{{ '/a/b' }}"])
def test_another_value_is_no_path(value: object) -> None:
    assert not is_local_path(value)


@pytest.mark.parametrize(
    ("start", "piece"), [("", "/a"), ('"', "/"), ('"', "/a"), ("", '"/a'), ("", "~"), ("", "file://"), ("", "C:\\")]
)
def test_the_time_is_linear_in_the_text(start: str, piece: str) -> None:
    begin = time.process_time()
    without_local_paths(start + piece * 160_000)
    assert time.process_time() - begin < 5  # a fraction of a second; quadratic would take minutes


def test_no_path_of_the_trainer_reaches_a_file_of_the_export(
    tmp_path: Path, export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training ran in ``home``: its paths are absolute, relative to it, and behind ~."""
    home = tmp_path / "home-of-the-trainer"
    (home / "base" / "model").mkdir(parents=True)
    folder = Case("llama-safetensors").copy(home)
    for name, facts in {
        "config.json": {"_name_or_path": "base/model", "output_dir": "out/run", "vision_path": f"{home}/clip"},
        "tokenizer_config.json": {"name_or_path": "base/model", "vocab_file": str(home), "cache": "~/secret-place"},
        "generation_config.json": {"_name_or_path": f"{home}/base"},
    }.items():
        known = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        (folder / name).write_text(json.dumps(known | facts))
    config = home / "own.yaml"
    config.write_text(f"own:\n  output_dir: {home}/out\n  cache_dir: file://{home}/cache\n  log: ~/secret-place/log\n")
    monkeypatch.chdir(tmp_path)
    output, report = export(
        folder,
        training_configs=(config,),
        train_command=f"deepspeed {home}/train.py --cache ~/secret-place/cache",
        datasets=(f"{home}/data",),
        command=f"python export_model.py --dataset {home}/data",
    )
    for path in output.iterdir():
        content = path.read_bytes()
        for trace in (b"home-of-the-trainer", b"secret-place", b"base/model", b"out/run", str(tmp_path).encode()):
            assert trace not in content, (path.name, trace)
    assert "deepspeed train.py --cache cache" in (output / "README.md").read_text()
    report["output"]["folder"] = None
    assert "home-of-the-trainer" not in json.dumps(report)
