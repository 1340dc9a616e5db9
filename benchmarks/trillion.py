"""The plan of a model with a trillion parameters: 64 ranks of ZeRO-3, 90 000 tensors, holes for all elements.

python -m benchmarks.trillion [--layers 10000] [--ranks 64] [--folder DIR]

Prints the seconds and the peak of anonymous memory of ``--dry_run``. The files have 12 TB and take about 2 GB of disk.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.bench import Best
from benchmarks.synthetic import Model, write_zero3_files


def main() -> None:
    """Make the checkpoint, plan its export, and remove it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=10_000)
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--folder")
    options = parser.parse_args()
    model = Model(hidden=2560, intermediate=9600, layers=options.layers)
    with tempfile.TemporaryDirectory(prefix="trillion-", dir=options.folder) as scratch:
        write_zero3_files(Path(scratch) / "checkpoint", model, options.ranks)
        best = Best()
        best.run("export_model.py", "--dry_run", "--prompt_format", "none", f"{scratch}/checkpoint")
    print(
        f"{model.parameters:,} parameters, {len(model.shapes):,} tensors, {options.ranks} ranks: "
        f"planned in {best.seconds:.1f} s with {best.memory / 1e6:.0f} MB."
    )


if __name__ == "__main__":
    main()
