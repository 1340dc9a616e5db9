"""The bytes of an export on the disk: shards, written, checked and sent several at a time; texts; the manifest."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, replace

from exporter.checkpoints.adapter import count_merged
from exporter.checksums import check_members
from exporter.console import Console
from exporter.description import describe_source
from exporter.errors import RefusedError
from exporter.hub import Push
from exporter.inputs import Inputs
from exporter.manifest import MANIFEST_NAME, Manifest
from exporter.options import Options, content_options
from exporter.page_cache import find_uncached, release
from exporter.plan import ExportPlan, PlannedTensor, Shard
from exporter.preparation import Prepared
from exporter.publisher import outgoing
from exporter.report import Report, package_versions
from exporter.shards import (
    Batch,
    NonFinite,
    Progress,
    WrittenFile,
    WrittenShard,
    block_workers,
    write_file,
    write_shard,
)
from exporter.staging import Staging
from exporter.tensors import GrownTensor, LazyTensor, Member, Piece
from exporter.verify import Check, check_batch, check_copy, check_file, check_names
from exporter.weights import PlannedWeights

SENT_TOGETHER = 1024 * 1024
"""Shards of fewer bytes are sent together before the commit: a request for each would take longer than its bytes."""


def write(
    prepared: Prepared,
    inputs: Inputs,
    staging: Staging,
    push: Push | None,
    options: Options,
    report: Report,
    console: Console,
) -> tuple[WrittenFile, ...]:
    """Write every file of the export into the staging and check it; the manifest comes last."""
    with report.timed("write"):
        shards = write_shards(prepared.planned, staging, push, options, console)
        _require_finite(shards, options.allow_nonfinite)
        report.checks += _check_checksums(shards)
        inputs.require_unchanged()
        files = [shard.file for shard in shards]
        files += [write_file(name, content, staging.folder) for name, content in sorted(prepared.texts.items())]
    report.checks += [
        Check("files", "passed", f"{len(files)} files have the size and sha256 that were written"),
        *_merge_checks(prepared.plan),
        *_source_checks(prepared.planned, options),
    ]
    manifest = Manifest(
        files=tuple(files),
        source=describe_source(prepared.checkpoint, prepared.code_commits, inputs, report),
        options=content_options(options),
        versions=package_versions(),
        checks=tuple(asdict(check) for check in report.checks),
    )
    files.append(write_file(MANIFEST_NAME, manifest.dump(), staging.folder))
    report.output["files"] = [asdict(file) for file in sorted(files, key=lambda file: file.path)]
    for file in files[len(shards) :]:
        check_file(file, staging.folder)
    return tuple(files)


def write_shards(
    planned: PlannedWeights, staging: Staging, push: Push | None, options: Options, console: Console
) -> list[WrittenShard]:
    """Write, check and send several shards at a time: the threads of ``pool`` hash them, ``workers`` do all else."""
    shards = planned.plan.shards
    work = planned.plan.total_size * (1 + (options.verify != "files") + (push is not None))
    work += sum(copy.nbytes for copy in planned.copies.values()) if options.verify != "files" else 0
    with (
        block_workers(options.jobs) as workers,
        ThreadPoolExecutor(max_workers=options.jobs) as pool,
        console.progress("Exporting weights", work) as progress,
    ):

        def start(number: int) -> list[Future[WrittenShard]]:
            return [
                pool.submit(_written_and_checked, shard, planned, staging, options, workers, progress)
                for shard in itertools.islice(waiting, number)
            ]

        waiting, finished = iter(shards), []
        running = set(start(_staged_shards(options)))
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                finished.append(future.result())
                if push is not None:
                    _send_ahead(push, finished[-1], staging, options)
                    progress(finished[-1].file.size)
                running.update(start(1))
    return sorted(finished, key=lambda written: written.file.path)


def _send_ahead(push: Push, written: WrittenShard, staging: Staging, options: Options) -> None:
    """Upload a finished shard while others are written, and make room for them where nobody keeps it."""
    if written.file.size < SENT_TOGETHER or (written.nonfinite and not options.allow_nonfinite):
        return
    if push.send_ahead(outgoing(written.file, staging.folder)) and not _keeps_shards(options):
        staging.journal.remove(written)


def _written_and_checked(
    shard: Shard, planned: PlannedWeights, staging: Staging, options: Options, workers: Executor, progress: Progress
) -> WrittenShard:
    """The shard on the disk and proven, now or by an earlier run."""
    written = staging.journal.finished(shard, progress)
    if written is not None:
        return written

    copied = [tensor for tensor in shard.tensors if tensor.name in planned.copies]
    sources = [tensor.source for tensor in shard.tensors] + [planned.copies[tensor.name] for tensor in copied]
    uncached = find_uncached(sources)

    def finish(batch: Batch) -> None:
        if options.verify != "files":
            check_batch(shard, batch, staging.folder, progress)
        tensors = (portion.tensor for portion in batch.portions)
        release((tensor.source for tensor in tensors if tensor.name not in planned.copies), uncached)

    def compare(tensor: PlannedTensor) -> None:
        master, copy = replace(tensor, source=_ungrown(tensor.source)), planned.copies[tensor.name]
        check_copy(master, copy, progress)
        release([master.source, copy], uncached)

    written = write_shard(shard, staging.folder, workers, progress, finish)
    if options.verify != "files":
        check_names(shard, staging.folder)
        list(workers.map(compare, copied))
    staging.journal.add(written)
    return written


def _check_checksums(shards: Sequence[WrittenShard]) -> list[Check]:
    """The archives' own checksums, of every member that was read."""
    pieces: dict[Member, set[Piece]] = {}
    for shard in shards:
        for member, read in shard.pieces.items():
            pieces.setdefault(member, set()).update(read)
    count = check_members(pieces)
    return [Check("checksums", "passed", f"{count} archive members have their CRC-32")] if count else []


def _source_checks(planned: PlannedWeights, options: Options) -> list[Check]:
    if options.verify == "files":
        return []
    count = len(planned.plan.tensors)
    checks = [Check("source", "passed", f"{count} tensors equal the checkpoint bit for bit after the cast")]
    if planned.copies:
        detail = f"{len(planned.copies)} master weights, cast, are the model's own copy bit for bit"
        checks.append(Check("copy", "passed", detail))
    return checks


def _merge_checks(plan: ExportPlan) -> list[Check]:
    count = count_merged(tensor.source for tensor in plan.tensors)
    return [Check("merge", "passed", f"the adapter is merged into {count} tensors, in fp32, each cast once")] * bool(
        count
    )


def _require_finite(shards: Sequence[WrittenShard], allowed: bool) -> None:
    """Refuse NaN, infinities and overflow, which load without a word and are wrong."""
    found = {name: count for shard in shards for name, count in shard.nonfinite.items()}
    if not found or allowed:
        return
    names = ", ".join(f"{name} ({_count(count)})" for name, count in list(found.items())[:3])
    raise RefusedError(
        f"{len(found)} tensor(s) hold values that are not finite: {names}{', …' if len(found) > 3 else ''}.",
        "Export an earlier checkpoint or another --dtype, or pass them on with --allow_nonfinite.",
    )


def _count(count: NonFinite) -> str:
    parts = [f"{count.source} in the checkpoint"] if count.source else []
    return ", ".join(parts + ([f"{count.cast} overflow in the cast"] if count.cast else []))


def _keeps_shards(options: Options) -> bool:
    """Whether a shard is needed after it was sent."""
    return options.output_folder is not None or options.verify == "load" or not options.publishes


def needed_bytes(prepared: Prepared, options: Options) -> int:
    """The most bytes of the export that are in the staging at the same time."""
    sizes = sorted((shard.size for shard in prepared.plan.shards), reverse=True)
    if not _keeps_shards(options):
        sizes = sizes[: _staged_shards(options)] + [size for size in sizes if size < SENT_TOGETHER]
    return sum(map(len, prepared.texts.values())) + sum(sizes)


def _staged_shards(options: Options) -> int:
    """Shards at a time: those that are written, and one that is sent meanwhile."""
    return options.jobs + 1


def _ungrown(tensor: LazyTensor) -> LazyTensor:
    """The tensor without the rows that the export adds."""
    return tensor.base if isinstance(tensor, GrownTensor) else tensor
