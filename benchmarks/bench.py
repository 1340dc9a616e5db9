"""This project, its peers and the machine's limit on the same checkpoints, in one run, as a Markdown table of ratios.

python -m benchmarks.bench [--sizes 0.2B,0.8B] [--rounds 3] [--folder DIR]

Every round runs all of them in turn, and the least time and the largest memory of each count: other users of the
machine make a run slower, never faster. What ours and the peer wrote is compared bit for bit.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from benchmarks import synthetic
from benchmarks.synthetic import SIZES, TAG

IMPORT_SECONDS = 3.5
"""What importing torch and transformers takes; the limit has no such start."""

FORMATS = {
    "zero2": (synthetic.write_zero2, ("load_state_dict", "zero_to_fp32"), f"{TAG}/mp_rank_*"),
    "zero3": (synthetic.write_zero3, ("load_state_dict", "zero_to_fp32"), f"{TAG}/*_optim_states.pt"),
    "pretrained": (synthetic.write_pretrained, ("pretrained",), "model.safetensors"),
}
"""Of each format: its writer, its peers, and the files that an export reads."""


@dataclass
class Best:
    """The least seconds and the most anonymous memory (bytes) of all runs of a command."""

    seconds: float = float("inf")
    memory: int = 0

    def run(self, *command: str) -> None:
        """Run it once more."""
        os.sync()
        start = time.perf_counter()
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=errors)
            while process.poll() is None:
                self.memory = max(self.memory, sum(map(anonymous_memory, family(process.pid))))
                time.sleep(0.01)
            self.seconds = min(self.seconds, time.perf_counter() - start)
            if process.returncode:
                errors.seek(0)
                sys.exit(f"{' '.join(command)} failed:\n{errors.read().decode()}")


def family(pid: int) -> Iterator[int]:
    """A process and its children."""
    yield pid
    try:
        for path in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in path.read_text().split():
                yield from family(int(child))
    except OSError:
        return


def anonymous_memory(pid: int) -> int:
    """Bytes of a process that are neither page cache nor files; zero where it has ended."""
    try:
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return 1024 * int(fields.get("RssAnon", "0 kB").split()[0])
    except OSError:
        return 0


def measure(kind: str, size: str, rounds: int, scratch: Path) -> str:
    """The row of the table for one format and size."""
    write, peers, inputs = FORMATS[kind]
    checkpoint, output, other = scratch / "checkpoint", scratch / "ours", scratch / "theirs"
    write(checkpoint, SIZES[size])
    sources = [str(path) for path in checkpoint.glob(inputs)]
    ours, limit, theirs = Best(), Best(), {name: Best() for name in peers}
    export = ("export_model.py", "--prompt_format", "none", "--output_folder", str(output), str(checkpoint))
    for _ in range(rounds):
        shutil.rmtree(output, ignore_errors=True)
        ours.run(*export)
        for name, best in theirs.items():
            shutil.rmtree(other, ignore_errors=True)
            best.run("-m", "benchmarks.peers", name, str(checkpoint), str(other))
            require_equal(output, other)
        shutil.rmtree(other)
        limit.run("-m", "benchmarks.limit", str(scratch / "limit"), str(2 * SIZES[size].parameters), *sources)
        (scratch / "limit").unlink()
    shutil.rmtree(checkpoint)
    name = min(theirs, key=lambda name: theirs[name].seconds)
    peer = theirs[name]
    return (
        f"| {kind} | {size} | {ours.seconds:.1f} | {peer.seconds:.1f} ({name}) | {peer.seconds / ours.seconds:.1f} "
        f"| {limit.seconds:.1f} | {max(ours.seconds - IMPORT_SECONDS, 0) / limit.seconds:.2f} "
        f"| {ours.memory / 1e6:.0f} | {peer.memory / 1e6:.0f} |"
    )


def require_equal(ours: Path, theirs: Path) -> None:
    """Both folders hold the same tensors, bit for bit, in whatever files."""
    mine, other = places(ours), places(theirs)
    if mine.keys() != other.keys():
        sys.exit(f"Only one of this project and its peer wrote {sorted(mine.keys() ^ other.keys())}.")
    for name in mine:
        if not read(mine[name], name).view(torch.uint8).equal(read(other[name], name).view(torch.uint8)):
            sys.exit(f"{name} differs between this project and its peer.")


def places(folder: Path) -> dict[str, Path]:
    """The weight file of each tensor."""
    found: dict[str, Path] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def read(path: Path, name: str) -> torch.Tensor:
    """One tensor of a weight file."""
    with safe_open(path, "pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
    return tensor


def needed_bytes(sizes: list[str]) -> int:
    """Disk that the largest size takes: fp32 and bf16 weights in, one output, and a peer's fp32 and bf16 folders."""
    return 14 * max(SIZES[size].parameters for size in sizes)


def main() -> None:
    """Measure what the arguments name, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="0.2B,0.8B", help=f"of {', '.join(SIZES)}")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where the scratch folder is made: on the disk that is measured")
    options = parser.parse_args()
    sizes = options.sizes.split(",")
    folder = options.folder or tempfile.gettempdir()
    needed, free = needed_bytes(sizes), shutil.disk_usage(folder).free
    print(f"Needs {needed / 1e9:.0f} GB of disk in {folder}; {free / 1e9:.0f} GB are free.", file=sys.stderr)
    if free < needed:
        sys.exit("Name another --folder, or smaller --sizes.")
    print("| format | size | ours, s | peer, s | times faster | limit, s | of the limit* | ours, MB | peer, MB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for kind in options.formats.split(","):
        for size in sizes:
            with tempfile.TemporaryDirectory(prefix="bench-", dir=folder) as scratch:
                print(measure(kind, size, options.rounds, Path(scratch)), flush=True)
    print(f"\n\\* after {IMPORT_SECONDS} s for imports. MB: peak of anonymous memory.")


if __name__ == "__main__":
    main()
