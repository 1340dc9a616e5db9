"""The commands: options into values, errors into exit codes, results onto stdout.

Nothing heavy is imported before a command runs, so that help and usage errors answer at once.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from exporter import __version__
from exporter.errors import ExportError

if TYPE_CHECKING:
    from exporter.console import Console
    from exporter.options import Options
    from exporter.report import Report

Command = TypeVar("Command", bound=Callable[..., Any])

DTYPES = {"bf16": "bf16", "fp16": "fp16", "fp32": "fp32", "keep": "keep"}
DTYPES |= {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}

NOT_ON_CARD = frozenset(
    [
        "cache_dir",
        "no_publish",
        "output_folder",
        "private",
        "revision",
        "create_pr",
        "release_tag",
        "commit_message",
        "rehearse",
        "dry_run",
        "verify",
        "overwrite",
        "jobs",
        "report",
        "as_json",
        "quiet",
    ]
)
"""Options that do not change a byte of the export: the card's export command and the manifest leave them out."""


class HyphenCommand(click.Command):
    """Takes every long option with hyphens as well as with underscores, and from EXPORT_MODEL_<NAME>."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.token_normalize_func = _underscored
        ctx.meta["arguments"] = list(args)
        rest = super().parse_args(ctx, args)
        for parameter in self.get_params(ctx):
            _require_text(parameter, ctx.params.get(parameter.name or ""))
        return rest


def _require_text(parameter: click.Parameter, value: Any) -> None:
    """Bytes of an argument that are no text in UTF-8 arrive as surrogates, which no file can hold."""
    for item in value if isinstance(value, tuple) else (value,):
        if isinstance(item, str) and any("\ud800" <= character <= "\udfff" for character in item):
            raise click.UsageError(f"{parameter.opts[0]} is not text in UTF-8.")


def _underscored(name: str) -> str:
    return name.replace("-", "_")


class SwitchOption(click.Option):
    """``--this/--that``, which can also come from EXPORT_MODEL_THIS or EXPORT_MODEL_THAT."""

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        other = os.environ.get(_variable(self.secondary_opts[0]))
        if super().resolve_envvar_value(ctx) is None and other:
            return str(not click.BOOL.convert(other, self, ctx))
        return super().resolve_envvar_value(ctx)


def _variable(name: str) -> str:
    return f"EXPORT_MODEL_{name.strip('-').upper()}"


def option(*names: str, **attributes: Any) -> Callable[[Command], Command]:
    """A click option that can also come from the environment."""
    long = next(name for name in names if name.startswith("--"))
    kind = SwitchOption if "/" in long else click.Option
    return click.option(*names, cls=kind, envvar=_variable(long.split("/")[0]), **attributes)


def options(*decorators: Callable[[Any], Any]) -> Callable[[Command], Command]:
    """Several options as one decorator, in the order of the help text."""

    def decorate(command: Command) -> Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


_PUBLISHED = re.compile(r"(?P<repo_id>[^/@.~][^/@]*/[^/@]+)(@(?P<revision>.+))?")
"""What names a repository on the Hub, where there is no such folder."""

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)

checkpoint_options = options(
    option("--tag", metavar="TAG", help="DeepSpeed tag, instead of what `latest` names."),
    option("--trust_remote_code", is_flag=True, help="Let this process import the checkpoint's own Python files."),
    option(
        "--cache_dir", type=click.Path(path_type=Path), metavar="DIR", help="Where downloads from the Hub are kept."
    ),
)
"""Which checkpoint, and what of it."""


weight_options = options(
    option(
        "--dtype",
        type=click.Choice(list(DTYPES)),
        default="bf16",
        show_default=True,
        help="Type of floating-point weights.",
    ),
    option(
        "--weights",
        type=click.Choice(["auto", "master", "model"]),
        default="auto",
        show_default=True,
        help="DeepSpeed: the fp32 master weights, or the model's own copy. auto: the copy where it is exact.",
    ),
    option("--keep_adapter", is_flag=True, help="Export a LoRA adapter as it is, not merged into its base model."),
    option("--max_shard_size", metavar="SIZE", default="5GB", show_default=True, help="Upper bound of a weight file."),
    option("--allow_nonfinite", is_flag=True, help="Export NaN and infinite weights."),
    option(
        "--prompt_format",
        metavar="auto|oasst|chatml|none|FILE",
        default="auto",
        show_default=True,
        help="Special tokens and chat template.",
    ),
    option("--special_token", "special_tokens", metavar="TOKEN", multiple=True, help="Add this token too."),
)
"""What is written."""


card_options = options(
    option("--license", metavar="ID", help="License, as the Hub names it."),
    option(
        "--base_model", metavar="NS/NAME", help="What this model is a fine-tuning of; an adapter's may be a folder."
    ),
    option("--language", "languages", metavar="CODE", multiple=True, help="Language of the model."),
    option("--dataset", "datasets", metavar="NS/NAME", multiple=True, help="Dataset it was trained on."),
    option("--card_template", type=_FILE, help="Jinja template of the model card."),
    option("--training_config", "training_configs", type=_FILE, multiple=True, help="YAML file of the training."),
    option("--train_command", metavar="TEXT", help="The command that trained the model."),
)
"""Facts for the model card."""

open_assistant_options = options(
    option("--rl_checkpoint", type=_FILE, metavar="FILE", help="Take the weights from what an RL training wrote."),
    option("--reward_model", is_flag=True, help="CHECKPOINT is a reward model."),
    option(
        "--rope_scaling_type",
        type=click.Choice(["linear", "dynamic"]),
        help="How the rotary embedding is scaled.  [default: linear]",
    ),
    option("--rope_scaling_factor", type=float, metavar="F", help="Scale the rotary embedding, for longer contexts."),
)
"""As in Open-Assistant's export script."""

release_options = options(
    option("--hf_repo_name", metavar="NS/NAME", help="Publish there."),
    option("--auth_token", metavar="TOKEN", help="Hub token. Safer: HF_TOKEN, or the saved login."),
    option("--private/--public", default=True, show_default=True, help="Visibility of a new repository."),
    option("--revision", metavar="BRANCH", default="main", show_default=True, help="Branch to commit to."),
    option("--create_pr", is_flag=True, help="Commit to a pull request."),
    option("--release_tag", metavar="NAME", help="Tag the commit."),
    option("--commit_message", metavar="TEXT", help="Message of the commit."),
)
"""Where it is published."""

rehearsal_options = options(
    option("--rehearse", is_flag=True, help="Publish to a throw-away Hub on this machine, read back and load."),
    option("--no_publish", is_flag=True, help="Everything but the publishing; needs no token."),
)
"""What is done instead of publishing."""

folder_options = options(
    option("--output_folder", type=click.Path(path_type=Path), metavar="DIR", help="Keep the exported folder there."),
    option("--overwrite", is_flag=True, help="Replace what is at --output_folder."),
    option("--dry_run", is_flag=True, help="Print the plan; write and send nothing."),
    option(
        "--verify",
        type=click.Choice(["files", "source", "load"]),
        default="source",
        show_default=True,
        help="How far the result is checked; each includes the one before.",
    ),
    option("--jobs", type=click.IntRange(1), default=os.cpu_count() or 1, help="Shards at a time.  [default: cores]"),
)
"""What is kept on this machine, and how the result is checked."""

result_options = options(
    option("--report", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Write a JSON report."),
    option("--json", "as_json", is_flag=True, help="Print the report instead of text."),
    option("--quiet", is_flag=True, help="No notes and no progress."),
)
"""How the result is told."""


@click.command(cls=HyphenCommand, context_settings={"max_content_width": 120})
@click.argument("checkpoint", type=click.Path(path_type=Path))
@checkpoint_options
@weight_options
@open_assistant_options
@card_options
@release_options
@rehearsal_options
@folder_options
@result_options
@click.version_option(__version__, package_name="export-model")
@click.pass_context
def export(ctx: click.Context, /, **values: Any) -> None:
    """Export CHECKPOINT as a model repository.

    CHECKPOINT is a DeepSpeed or Hugging Face folder, a training run's output, or NAMESPACE/NAME[@REVISION] on the Hub.
    """
    if not (values["hf_repo_name"] or values["output_folder"] or values["rehearse"] or values["dry_run"]):
        raise click.UsageError("Say where to: --hf_repo_name, --output_folder, --rehearse or --dry_run.")
    _require_report_outside(values["report"], values["output_folder"], "--output_folder")
    with ending(values["report"], values["as_json"], values["auth_token"]) as report:
        from exporter.console import Console
        from exporter.export import run_export

        options = _options(ctx, values)
        console = Console(values["quiet"])
        _warn_of_token(ctx, console)
        run_export(options, report, console)
    _print_result(report, values["as_json"], _export_lines)


@click.command(cls=HyphenCommand)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@checkpoint_options
@result_options
def inspect(
    checkpoint: Path,
    tag: str | None,
    trust_remote_code: bool,
    cache_dir: Path | None,
    report: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Say what CHECKPOINT holds; no tensor data is read."""
    with ending(report, as_json) as findings:
        from exporter.console import Console
        from exporter.hub import HubAccess
        from exporter.inspection import run_inspect

        run_inspect(checkpoint, tag, HubAccess(cache=cache_dir, bars=not quiet), findings, Console(quiet))
    _print_result(findings, as_json, _inspect_lines)


@click.command(cls=HyphenCommand)
@click.argument("folder", type=click.Path(path_type=Path))
@option("--checkpoint", type=click.Path(path_type=Path), metavar="CHECKPOINT", help="Compare every tensor with it.")
@option("--load", is_flag=True, help="Load it offline with transformers, and generate.")
@option("--base_model", metavar="NS/NAME", help="The base model of an adapter, or its folder.")
@option("--rl_checkpoint", type=_FILE, metavar="FILE", help="The file that the weights were taken from.")
@checkpoint_options
@result_options
def verify(
    folder: Path,
    checkpoint: Path | None,
    load: bool,
    base_model: str | None,
    rl_checkpoint: Path | None,
    tag: str | None,
    trust_remote_code: bool,
    cache_dir: Path | None,
    report: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Prove the exported FOLDER again: its files, and if asked its tensors against CHECKPOINT, and that it loads.

    NAMESPACE/NAME[@REVISION] instead of FOLDER proves what is published there, without downloading weights.
    """
    published = _PUBLISHED.fullmatch(str(folder)) if not os.path.exists(folder) else None
    if published and (checkpoint or load):
        raise click.UsageError("--checkpoint and --load need a folder: download the repository first.")
    _require_report_outside(report, folder, "FOLDER")
    with ending(report, as_json) as findings:
        from exporter.console import Console
        from exporter.hub import HubAccess
        from exporter.proof import ProofOptions, prove_on_hub, run_verify

        if published:
            prove_on_hub(published["repo_id"], published["revision"] or "main", findings)
        else:
            options = ProofOptions(folder, checkpoint, tag, load, trust_remote_code, base_model, rl_checkpoint)
            run_verify(replace(options, access=HubAccess(cache=cache_dir, bars=not quiet)), findings, Console(quiet))
    _print_result(findings, as_json, _verify_lines)


@click.command(cls=HyphenCommand)
@click.argument("folder", type=click.Path(path_type=Path))
@release_options
@result_options
@click.pass_context
def publish(ctx: click.Context, /, report: Path | None, as_json: bool, quiet: bool, **values: Any) -> None:
    """Publish FOLDER, which was exported earlier with --hf_repo_name and --no_publish, exactly as it stands."""
    _require_report_outside(report, values["folder"], "FOLDER")
    with ending(report, as_json, values["auth_token"]) as findings:
        from exporter.console import Console
        from exporter.release import PublishOptions, run_publish

        console = Console(quiet)
        _warn_of_token(ctx, console)
        run_publish(PublishOptions(**values), findings, console)
    _print_result(findings, as_json, _release_lines)


@click.group(context_settings={"max_content_width": 120})
@click.version_option(__version__, package_name="export-model")
def main() -> None:
    """From a finished training run to a model repository that anybody can load."""


main.add_command(export)
main.add_command(inspect)
main.add_command(verify)
main.add_command(publish)


def _require_report_outside(report: Path | None, folder: Path | None, name: str) -> None:
    if report and folder and Path(os.path.realpath(report)).is_relative_to(os.path.realpath(folder)):
        raise click.UsageError(f"--report lies inside {name}, which holds the export's own files alone.")


def _warn_of_token(ctx: click.Context, console: Console) -> None:
    if ctx.get_parameter_source("auth_token") is ParameterSource.COMMANDLINE:
        console.warn("--auth_token can be read by other users of this machine; HF_TOKEN or the saved login cannot.")


def _options(ctx: click.Context, values: dict[str, Any]) -> Options:
    from exporter.options import Options
    from exporter.plan import parse_size

    fields = {name: value for name, value in values.items() if name not in ("report", "as_json", "quiet")}
    fields["dtype"] = DTYPES[fields["dtype"]]
    fields["max_shard_size"] = parse_size(fields["max_shard_size"])
    for name in ("special_tokens", "languages", "datasets", "training_configs"):
        fields[name] = tuple(fields[name])
    return Options(**fields, command=_card_command(ctx))


def _card_command(ctx: click.Context) -> str:
    """The command that was run, without the token, local paths, and options that change nothing in the export."""
    given = [p for p in ctx.command.params if ctx.get_parameter_source(p.name or "") is not ParameterSource.DEFAULT]
    words = [
        _card_words(parameter, ctx.params.get(parameter.name or "")) for parameter in sorted(given, key=_position(ctx))
    ]
    return " ".join(["python export_model.py", *filter(None, words)])


def _position(ctx: click.Context) -> Callable[[click.Parameter], int]:
    """Where a parameter first stood in the command; what came from the environment comes last."""
    arguments: list[str] = ctx.meta["arguments"]

    def is_named(argument: str, parameter: click.Parameter) -> bool:
        if isinstance(parameter, click.Argument):
            return bool(Path(argument) == ctx.params[parameter.name or ""])
        name = "--" + _underscored(argument[2:].partition("=")[0])
        return argument.startswith("--") and name in (*parameter.opts, *parameter.secondary_opts)

    def position(parameter: click.Parameter) -> int:
        found = (index for index, argument in enumerate(arguments) if is_named(argument, parameter))
        return next(found, len(arguments))

    return position


def _card_words(parameter: click.Parameter, value: Any) -> str:
    if parameter.name == "checkpoint":
        return "<output_path>" if os.path.exists(value) else str(value)
    if parameter.name == "auth_token":
        return "--auth_token <auth_token>"
    if parameter.name in NOT_ON_CARD or value is None or value is False:
        return ""
    if value is True:
        return parameter.opts[0]
    items = value if isinstance(value, tuple) else (value,)
    return " ".join(f"{parameter.opts[0]} {shlex.quote(_without_folder(parameter, item))}" for item in items)


def _without_folder(parameter: click.Parameter, item: Any) -> str:
    """A value as the card shows it: of a local path, the last name."""
    may_be_path = isinstance(item, Path) or parameter.name in ("prompt_format", "base_model")
    if may_be_path and (os.path.isabs(item) or os.path.exists(item)):
        return Path(item).name
    return str(item)


@contextmanager
def ending(report_path: Path | None, as_json: bool, token: str | None = None) -> Iterator[Report]:
    """Every way in which a command can end: its exit code, its line, its report, what a CI job learns.

    The report is written at the start too, as a failed one: a place that takes none is known before the work, and an
    earlier run's report is not taken for that of a run which was killed.
    """
    from exporter.console import say
    from exporter.report import Report

    report = Report()
    with _interruption() as received:
        code = _write_report(report, report_path)
        if not code:
            try:
                yield report
            except (Exception, KeyboardInterrupt) as error:
                # A library may turn the interrupt that it meets into an error of its own.
                code = _tell_failure(report, KeyboardInterrupt() if received else error, token)
            written = _write_report(report, report_path)
            code = code or written
        told = _tell_job(report, code)
        code = code or told
    if code:
        if as_json:
            say(report.dump())
        sys.exit(code)


@contextmanager
def _interruption() -> Iterator[list[int]]:
    """SIGTERM as SIGINT: the first one interrupts, later ones do not disturb the cleaning up. Yields those received."""
    received: list[int] = []

    def interrupt(signum: int, frame: Any) -> None:
        received.append(signum)
        if len(received) == 1:
            raise KeyboardInterrupt

    handlers = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _tell_failure(report: Report, error: BaseException, token: str | None) -> int:
    """Say why the run failed, note it in the report, and return its exit code.

    Whatever a library put into an error, neither ``token`` nor another credential gets out with it.
    """
    from exporter.console import say
    from exporter.credentials import redact
    from exporter.hub.account import known_tokens

    if isinstance(error, ExportError):
        code, kind, message, hint = error.exit_code, error.kind, error.message, error.hint
    elif isinstance(error, KeyboardInterrupt):
        code, kind, message, hint = 130, "interrupted", "Interrupted.", "Run the same command again to finish."
    else:
        code, kind, hint = 1, "bug", "Please report this with the traceback."
        message = f"{type(error).__name__}: {error}"
    tokens = known_tokens(token)
    message, hint = redact(message, tokens), redact(hint, tokens)
    report.fail(code, kind, message, hint)
    report.redact(tokens)
    if code == 1 or (os.environ.get("EXPORT_MODEL_DEBUG") and code != 130):
        say(redact("".join(traceback.format_exception(error)), tokens).rstrip("\n"), err=True)
    if code != 1:
        _say_failure(message, hint)
    return code


def _say_failure(message: str, hint: str) -> None:
    from exporter.console import say

    say(f"Error: {message}", err=True)
    say(f"Hint: {hint}", err=True)


def _write_report(report: Report, path: Path | None) -> int:
    """Zero, or the exit code of a report that cannot be written."""
    try:
        if path is not None:
            report.write(path)
    except ExportError as error:
        if report.error is None:
            report.fail(error.exit_code, error.kind, error.message, error.hint)
        _say_failure(error.message, error.hint)
        return error.exit_code
    return 0


def _tell_job(report: Report, code: int) -> int:
    """Zero, or the exit code of outputs or a summary that a CI job cannot get."""
    from exporter.ci import tell_job

    try:
        tell_job(report.as_dict(), code)
    except ExportError as error:
        _say_failure(error.message, error.hint)
        return error.exit_code
    return 0


def _print_result(report: Report, as_json: bool, lines: Callable[[dict[str, Any]], Sequence[str]]) -> None:
    from exporter.console import say

    try:
        for line in [report.dump()] if as_json else lines(report.as_dict()):
            say(line)
    except ExportError as error:
        _say_failure(error.message, error.hint)
        sys.exit(error.exit_code)


def _export_lines(report: dict[str, Any]) -> list[str]:
    output, tensors, hub = report["output"], report["tensors"], report["hub"]
    lines = [
        f"{report['status']}: {output['shards']} weight file(s), {output['total_size']:,} bytes of {output['dtype']}, "
        f"{tensors['written']} tensors ({tensors['cast']} cast, {len(tensors['tied'])} tied, "
        f"{len(tensors['dropped'])} dropped)"
    ]
    lines += [f"  {file['size']:>15,}  {file['path']}" for file in output["files"]]
    lines += _check_lines(report)
    if output.get("folder"):
        lines.append(f"folder: {output['folder']}")
    if hub:
        lines += _forecast_lines(hub) if "sent_bytes" in hub else []
        lines.append(hub["url"])
    return lines


def _forecast_lines(hub: dict[str, Any]) -> list[str]:
    """What publishing would do to the repository, file by file."""
    from exporter.report import planned_actions

    lines = [f"{action:>15}  {path}" for action, path in planned_actions(hub)]
    return [f"on {hub['revision']} of {hub['repo_id']}, up to {hub['sent_bytes']:,} bytes to send:", *lines]


def _release_lines(report: dict[str, Any]) -> list[str]:
    hub = report["hub"]
    counts = ", ".join(f"{len(hub[key])} {key}" for key in ("added", "deleted", "unchanged"))
    return [*_check_lines(report), f"{report['status']}: {counts}", hub["url"]]


def _verify_lines(report: dict[str, Any]) -> list[str]:
    return [*_check_lines(report), *([report["hub"]["url"]] if report["hub"] else [])]


def _check_lines(report: dict[str, Any]) -> list[str]:
    return [f"{check['name']}: {check['status']} ({check['detail']})" for check in report["checks"]]


def _inspect_lines(report: dict[str, Any]) -> list[str]:
    return [f"{key}: {_brief(value)}" for key, value in report["checkpoint"].items() if value is not None]


def _brief(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {number}" for key, number in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
