"""Publishing while converting against converting first: many small files, one large one, and some.

python -m benchmarks.push [--rounds 2] [--folder DIR]

The Hub is the rehearsal Hub on this machine, over Xet and over LFS, without a network: this project's own part is
measured. Every round publishes each case both ways to a new Hub; the least time of each counts.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks import synthetic
from benchmarks.bench import Best
from benchmarks.synthetic import SIZES, Model
from exporter.rehearsal import RehearsalHub

CASES = {
    "many small files": (Model(64, 128, 330), "40KB"),
    "one large file": (SIZES["0.8B"], "100GB"),
    "20 files": (SIZES["0.8B"], "90MB"),
}
"""Of each case: the model, and the shard size that cuts it so."""


def measure(case: str, transport: str, rounds: int, scratch: Path) -> str:
    """The row of the table for one case and transport."""
    model, shard_size = CASES[case]
    checkpoint, output = scratch / "checkpoint", scratch / "output"
    synthetic.write_zero3(checkpoint, model)
    export = ["export_model.py", "--prompt_format", "none", "--max_shard_size", shard_size, str(checkpoint)]
    together, converted, published = Best(), Best(), Best()
    for _ in range(rounds):
        with a_hub(transport):
            together.run(*export, "--hf_repo_name", "org/model")
        with a_hub(transport):  # one of its own: a Hub that has the bytes already takes them in no time
            converted.run(*export, "--hf_repo_name", "org/model", "--no_publish", "--output_folder", str(output))
            published.run("-m", "exporter", "publish", str(output))
        files = len(list(output.iterdir()))
        shutil.rmtree(output)
    shutil.rmtree(checkpoint)
    first, then = converted.seconds, published.seconds
    return (
        f"| {case} | {files} | {transport} | {together.seconds:.1f} | {first:.1f} + {then:.1f} "
        f"| {(first + then) / together.seconds:.2f} |"
    )


@contextmanager
def a_hub(transport: str) -> Iterator[None]:
    """A new Hub, which the commands that are run know from the environment."""
    with RehearsalHub(organizations=["org"], xet=transport == "xet") as hub:
        os.environ |= {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": hub.token}
        yield


def main() -> None:
    """Measure every case, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder")
    options = parser.parse_args()
    print("| case | files | transport | while converting, s | first, then, s | times faster |")
    print("|---|---|---|---|---|---|", flush=True)
    for case, transport in itertools.product(CASES, ("xet", "lfs")):
        with tempfile.TemporaryDirectory(prefix="push-", dir=options.folder) as scratch:
            print(measure(case, transport, options.rounds, Path(scratch)), flush=True)


if __name__ == "__main__":
    main()
