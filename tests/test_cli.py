"""The commands as a user and a CI job meet them: options, exit codes, stdout, the report, signals."""

from __future__ import annotations

import configparser
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from exporter.cli import ending, export, inspect, main
from exporter.errors import CheckpointError
from tests.conftest import Case

ROOT = Path(__file__).parent.parent
PROGRAM = str(ROOT / "export_model.py")
CHECKPOINT = str(Case("llama-safetensors").checkpoint)
VALUES = {
    "max_shard_size": "3MB",
    "jobs": "3",
    "dtype": "fp32",
    "weights": "master",
    "verify": "files",
    "rope_scaling_type": "dynamic",
    "rope_scaling_factor": "2.5",
}
OPTIONS = [option for option in export.params if isinstance(option, click.Option) and option.name != "version"]


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(export, list(arguments))


def parsed(*arguments: str) -> dict[str, Any]:
    return export.make_context("export_model.py", list(arguments)).params


def typed(option: click.Option) -> list[str]:
    """The option with a value, as it is typed."""
    name = (option.secondary_opts or option.opts)[0]
    return [name] if option.is_flag else [name, VALUES.get(option.name or "", str(ROOT / "ruff.toml"))]


def test_help_imports_nothing_heavy() -> None:
    traced = subprocess.run([sys.executable, "-X", "importtime", PROGRAM, "--help"], capture_output=True, text=True)
    assert "--max_shard_size" in traced.stdout
    modules = {line.rpartition("|")[2].strip() for line in traced.stderr.splitlines()}
    assert "exporter.cli" in modules
    assert modules.isdisjoint({"torch", "transformers", "huggingface_hub", "jinja2", "starlette", "numpy", "yaml"})


def test_the_declared_entry_points_and_the_package_are_the_commands() -> None:
    declared = configparser.ConfigParser()
    declared.read(ROOT / "setup.cfg")
    scripts = dict(
        line.split(" = ") for line in declared["options.entry_points"]["console_scripts"].strip().splitlines()
    )
    found = {
        name: importlib.import_module(place.split(":")[0]).__dict__[place.split(":")[1]]
        for name, place in scripts.items()
    }
    assert found == {"export-model": export, "exporter": main}
    assert main.commands["export"] is export
    finished = subprocess.run([sys.executable, "-m", "exporter", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert finished.stdout.startswith("exporter, version ")


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_an_option_has_two_spellings_and_stands_before_or_after_the_checkpoint(option: click.Option) -> None:
    words = typed(option)
    hyphened = [words[0].replace("_", "-"), *words[1:]]
    assert parsed(*words, "checkpoint") == parsed("checkpoint", *hyphened)
    assert parsed(*words, "checkpoint") != parsed("checkpoint")


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_an_option_can_come_from_the_environment(option: click.Option, monkeypatch: pytest.MonkeyPatch) -> None:
    words = typed(option)
    monkeypatch.setenv(f"EXPORT_MODEL_{words[0].strip('-').upper()}", words[1] if words[1:] else "1")
    from_environment = parsed("checkpoint")
    monkeypatch.undo()
    assert from_environment == parsed(*words, "checkpoint")


def test_visibility_can_come_from_the_environment_under_either_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value, private in [("PRIVATE", "0", False), ("PUBLIC", "0", True), ("PUBLIC", "1", False)]:
        with monkeypatch.context() as patch:
            patch.setenv(f"EXPORT_MODEL_{name}", value)
            assert parsed("checkpoint")["private"] is private
            assert parsed("checkpoint", "--private")["private"] is True


def test_a_value_is_taken_as_it_stands() -> None:
    assert parsed("checkpoint", "--special-token", "--end-of-turn")["special_tokens"] == ("--end-of-turn",)
    assert parsed("--dry-run", "--", "--my-run")["checkpoint"] == Path("--my-run")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ([CHECKPOINT], 2),
        ([CHECKPOINT, "--no_such_option"], 2),
        ([CHECKPOINT, "--dry_run", "--dtype", "int4"], 2),
        ([CHECKPOINT, "--dry_run", "--max_shard_size", "2XB"], 2),
        ([CHECKPOINT, "--dry_run", "--max_shard_size", "0"], 2),
        ([CHECKPOINT, "--no_publish", "--output_folder", "out", "--hf_repo_name", "no-namespace"], 2),
        ([CHECKPOINT, "--no_publish", "--hf_repo_name", "a/b"], 2),
        ([CHECKPOINT, "--output_folder", f"{CHECKPOINT}/out"], 2),
        ([CHECKPOINT, "--dry_run", "--prompt_format", "no-such-file"], 2),
        ([CHECKPOINT, "--output_folder", "out", "--report", "out/report.json"], 2),
        (["no-such-folder", "--dry_run"], 2),
        ([".", "--dry_run"], 3),
        ([CHECKPOINT, "--output_folder", "a-file"], 5),
        ([CHECKPOINT, "--dry_run", "--report", "no-such-folder/report.json"], 5),
    ],
    ids=str,
)
def test_a_failure_has_its_exit_code_and_prints_nothing_on_stdout(
    arguments: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-file").touch()
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert "Error: " in result.stderr
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a-file"]


def test_a_failure_with_json_prints_the_report_that_is_also_written(tmp_path: Path) -> None:
    result = invoke("no-such-folder", "--dry_run", "--json", "--report", str(tmp_path / "report.json"))
    assert result.exit_code == 2
    report = json.loads(result.stdout)
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert (report["status"], report["error"]["code"], report["error"]["kind"]) == ("failed", 2, "usage")
    error = report["error"]
    assert result.stderr == f"Error: {error['message']}\nHint: {error['hint']}\n"


def test_a_report_that_cannot_be_written_is_said_in_the_json_before_any_work(tmp_path: Path) -> None:
    place = str(tmp_path / "none" / "report.json")
    result = invoke(CHECKPOINT, "--output_folder", str(tmp_path / "out"), "--json", "--report", place)
    assert result.exit_code == json.loads(result.stdout)["error"]["code"] == 5
    assert result.stderr.count("Error: ") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_report_replaces_no_pipe_or_device(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    result = invoke(CHECKPOINT, "--output_folder", str(tmp_path / "out"), "--report", str(tmp_path / "pipe"))
    assert (result.exit_code, result.stdout) == (5, "")
    assert "pipe is no regular file" in result.stderr
    assert (tmp_path / "pipe").is_fifo()


def test_a_report_is_written_where_a_link_leads(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("report.json")
    invoke("no-such-folder", "--dry_run", "--report", str(tmp_path / "link"))
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "report.json").read_text())["status"] == "failed"


@pytest.mark.parametrize("command", ["publish", "verify"])
def test_a_report_does_not_damage_the_folder_that_it_is_about(command: str, tmp_path: Path) -> None:
    (tmp_path / "export.json").write_text("{}")
    result = CliRunner().invoke(main, [command, str(tmp_path), "--report", str(tmp_path / "export.json")])
    assert (result.exit_code, result.stdout) == (2, "")
    assert (tmp_path / "export.json").read_text() == "{}"


def test_an_empty_repository_name_is_not_taken_for_none(tmp_path: Path) -> None:
    result = invoke(CHECKPOINT, "--hf_repo_name", "", "--output_folder", str(tmp_path / "out"))
    assert (result.exit_code, result.stdout) == (2, "")
    assert list(tmp_path.iterdir()) == []


def test_an_argument_that_is_not_utf_8_is_a_usage_error() -> None:
    result = invoke(CHECKPOINT, "--dry_run", "--train_command", os.fsdecode(b"tr\xe4in"))
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--train_command is not text in UTF-8" in result.stderr


def test_the_report_of_an_earlier_run_does_not_outlive_the_start(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text('{"status": "published"}')
    with ending(path, as_json=False) as report:
        assert json.loads(path.read_text())["status"] == "failed"
        report.status = "exported"
    assert json.loads(path.read_text())["status"] == "exported"


def test_a_success_with_json_is_one_object_on_stdout(tmp_path: Path) -> None:
    result = invoke(CHECKPOINT, "--output_folder", str(tmp_path / "out"), "--json", "--quiet")
    assert (result.exit_code, result.stderr) == (0, "")
    report = json.loads(result.stdout)
    assert (report["status"], report["error"]) == ("exported", None)
    assert {file["path"] for file in report["output"]["files"]} == {path.name for path in (tmp_path / "out").iterdir()}


def test_the_plan_is_printed_by_a_dry_run_that_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke(CHECKPOINT, "--dry-run")
    assert result.exit_code == 0
    assert result.stdout.startswith("planned: 1 weight file(s)")
    assert "model.safetensors" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_inspect_says_what_the_checkpoint_holds() -> None:
    result = CliRunner().invoke(inspect, [str(Case("llama-zero3").checkpoint), "--json"])
    found = json.loads(result.stdout)
    assert found["status"] == "inspected"
    assert {key: found["checkpoint"][key] for key in ("format", "zero_stage", "available")} == {
        "format": "zero",
        "zero_stage": 3,
        "available": ["master"],
    }
    assert "zero_stage: 3" in CliRunner().invoke(inspect, [str(Case("llama-zero3").checkpoint)]).stdout


def test_debug_shows_the_traceback_of_an_expected_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPORT_MODEL_DEBUG", "1")
    result = invoke("no-such-folder", "--dry_run")
    assert result.exit_code == 2
    assert result.stderr.startswith("Traceback")
    assert "UsageError" in result.stderr


def test_the_card_has_the_command_as_it_was_typed_without_token_and_paths(tmp_path: Path) -> None:
    run, place = Case("llama-safetensors").copy(tmp_path), tmp_path / "files"
    place.mkdir()
    for name, key in (("config.json", "_name_or_path"), ("tokenizer_config.json", "name_or_path")):
        document = json.loads((run / name).read_text())
        (run / name).write_text(json.dumps(document | {key: str(run)}))
    (place / "falcon.yaml").write_text("falcon-7b:\n  dtype: bf16\n")
    (place / "own.jinja").write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    words = ["--dtype", "fp32", f"{run}/", "--hf_repo_name", "OpenAssistant/llama", "--auth_token", "hf_secret"]
    words += ["--prompt-format", str(place / "own.jinja"), "--special_token", "<|x y|>", "--max_shard_size=2GB"]
    words += ["--training_config", str(place / "falcon.yaml"), "--base_model", str(tmp_path / "base")]
    result = invoke(*words, "--no_publish", "--output_folder", str(tmp_path / "out"), "--jobs", "1", "--quiet")
    assert result.exit_code == 0, result.stderr
    card = (tmp_path / "out" / "README.md").read_text()
    command = next(line for line in card.splitlines() if line.startswith("python export_model.py"))
    assert command == (
        "python export_model.py --dtype fp32 <output_path> --hf_repo_name OpenAssistant/llama --auth_token "
        "<auth_token> --prompt_format own.jinja --special_token '<|x y|>' --max_shard_size 2GB "
        "--training_config falcon.yaml --base_model base"
    )
    for path in (tmp_path / "out").iterdir():
        content = path.read_bytes()
        assert str(tmp_path).encode() not in content, path.name
        assert b"hf_secret" not in content, path.name


# How a run ends


def start_inspect(stdout: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "exporter", "inspect", CHECKPOINT]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=stdout, stderr=subprocess.PIPE)


def test_a_reader_that_has_gone_away_does_not_make_a_run_fail() -> None:
    read, write = os.pipe()
    os.close(read)
    process = start_inspect(write)
    os.close(write)
    assert (process.communicate()[1], process.returncode) == ("", 0)


def test_a_result_that_cannot_be_printed_is_exit_5() -> None:
    with open("/dev/full", "w") as full:
        process = start_inspect(full)
        errors = process.communicate()[1]
    assert process.returncode == 5
    assert errors.splitlines()[0] == "Error: The result cannot be printed: No space left on device."


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_with_130_and_leaves_nothing_that_is_seen(number: signal.Signals, tmp_path: Path) -> None:
    output, report = tmp_path / "place" / "out", tmp_path / "report.json"
    options = ["--output_folder", str(output), "--verify", "load", "--report", str(report)]
    process = subprocess.Popen(
        [sys.executable, PROGRAM, CHECKPOINT, *options], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while not output.parent.exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(number)
    process.send_signal(number)
    stdout, stderr = process.communicate()
    assert (process.returncode, stdout) == (130, "")
    assert stderr == "Error: Interrupted.\nHint: Run the same command again to finish.\n"
    places = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    seen = [str(path) for path in places if not any(part.startswith(".") for part in path.parts)]
    assert seen == ["report.json"]
    assert json.loads(report.read_text())["error"]["code"] == 130


def test_an_interrupt_is_one_also_where_a_library_makes_another_error_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    cleaned_up = False
    with pytest.raises(SystemExit) as ended, ending(None, as_json=False):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        except KeyboardInterrupt as interrupt:
            os.kill(os.getpid(), signal.SIGINT)
            cleaned_up = True
            raise CheckpointError("This file cannot be read.", "Copy it again.") from interrupt
    assert (ended.value.code, cleaned_up) == (130, True)
    assert capsys.readouterr().err.startswith("Error: Interrupted.")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_bug_keeps_its_traceback_and_is_exit_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.json"
    with pytest.raises(SystemExit) as ended, ending(path, as_json=True):
        raise ZeroDivisionError("of all things")
    assert ended.value.code == 1
    printed = capsys.readouterr()
    assert "Traceback" in printed.err
    assert json.loads(printed.out)["error"] == {
        "code": 1,
        "kind": "bug",
        "message": "ZeroDivisionError: of all things",
        "hint": "Please report this with the traceback.",
    }
    assert json.loads(printed.out) == json.loads(path.read_text())
