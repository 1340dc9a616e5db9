"""What the report and the manifest say of an export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from exporter.checkpoints import Checkpoint
from exporter.hub import Connection
from exporter.inputs import Inputs
from exporter.manifest import MANIFEST_NAME
from exporter.options import TARGETS
from exporter.plan import ExportPlan
from exporter.report import Report
from exporter.tokenizer import Vocabulary
from exporter.weights import PlannedWeights


def describe_source(
    checkpoint: Checkpoint, code_commits: Mapping[str, str], inputs: Inputs, report: Report
) -> dict[str, Any]:
    """What an export was made from; ``code_commits`` are the repositories that code was taken from."""
    facts = {key: report.checkpoint[key] for key in ("format", "zero_stage", "world_size", "tag", "step", "weights")}
    facts |= {key: report.checkpoint[key] for key in ("repo_id", "revision") if report.checkpoint[key] is not None}
    if checkpoint.base is not None:
        facts["base_model"] = checkpoint.base.hub_name
    if code_commits:
        facts["code"] = dict(code_commits)
    return facts | {"files": [file.describe() for file in inputs.files.values()]}


def describe_forecast(connection: Connection, plan: ExportPlan, texts: Mapping[str, bytes]) -> dict[str, Any]:
    """The report's ``hub`` of a run that publishes nothing; the manifest's size is not known yet."""
    sizes = {shard.name: shard.size for shard in plan.shards} | {MANIFEST_NAME: 0}
    forecast = connection.forecast(texts, sizes)
    return {
        "endpoint": connection.endpoint,
        "repo_id": connection.repository.repo_id,
        "url": connection.repository.url,
        "commit": connection.head,
        "revision": connection.revision,
        "pr_url": None,
        "tag": connection.destination.release_tag,
        "transport": None,
        **asdict(forecast),
        "added": sorted(forecast.added + forecast.replaced),
        "uploaded_bytes": 0,
    }


def describe_vocabulary(vocabulary: Vocabulary, rows: int | None) -> dict[str, Any]:
    return {
        "tokenizer_size": vocabulary.size,
        "rows": rows,
        "added": list(vocabulary.added),
        "prompt_format": vocabulary.prompt_format,
        "eos_token": vocabulary.eos_token,
        "pad_token": vocabulary.pad_token,
    }


def describe_tensors(planned: PlannedWeights, checkpoint: Checkpoint) -> dict[str, Any]:
    plan, matched = planned.plan, planned.account
    return {
        "written": len(plan.tensors),
        "cast": sum(tensor.dtype is not tensor.source.dtype for tensor in plan.tensors),
        "kept": {tensor.name: tensor.dtype.name for tensor in plan.tensors if tensor.dtype is not planned.dtype},
        "dropped": {**checkpoint.dropped, **matched.dropped},
        "tied": dict(matched.tied),
    }


def describe_plan(planned: PlannedWeights, texts: Mapping[str, bytes]) -> dict[str, Any]:
    plan = planned.plan
    spelled = {target: name for name, target in TARGETS.items() if target is not None}
    files = [(shard.name, shard.size) for shard in plan.shards] + [(name, len(text)) for name, text in texts.items()]
    return {
        "folder": None,
        "dtype": spelled.get(planned.dtype, planned.dtype.value),
        "shards": len(plan.shards),
        "total_size": plan.total_size,
        "files": [{"path": name, "size": size, "sha256": None} for name, size in sorted(files)],
    }
