"""Makes the checkpoints in this folder: ``python make_checkpoints.py [CASE ...]``.

If none is named, all that the installed version of DeepSpeed writes. To make one of another version, name it, with the
unpacked source of that version in PYTHONPATH.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from cases import CASES, Case

HERE = Path(__file__).parent


def main() -> None:
    names = sys.argv[1:] or [name for name, case in CASES.items() if case.version == version("deepspeed")]
    for name in names:
        make(CASES[name])
        print(f"{name}: {size(HERE / name)} bytes", flush=True)


def make(case: Case) -> None:
    """Trains a case in a private folder and moves the result into its place when it is whole.

    DeepSpeed puts programs of its own beside the weights; they are not part of this project.
    """
    with tempfile.TemporaryDirectory() as scratch:
        train(case, Path(scratch))
        target = HERE / case.name
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(scratch, target, ignore=shutil.ignore_patterns("zero_to_*.py"))


def train(case: Case, folder: Path) -> None:
    ranks = ["--standalone", "--nproc_per_node", str(case.world_size)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", *ranks, str(HERE / "train.py"), case.name]
    subprocess.run(command, cwd=folder, env=environment, check=True)


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
