"""An input is known by its files, and a checkpoint that is written to while it is exported is noticed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from exporter.checkpoints import Checkpoint
from exporter.errors import CheckpointError
from exporter.inputs import Inputs
from tests.test_tensors import store


@pytest.mark.parametrize("size", [1, 1000, 64 * 1024, 100_000, 200_000])
def test_an_input_is_known_by_its_size_its_start_and_its_end(size: int, tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    tensor = store(path, torch.randint(0, 256, (size,), dtype=torch.uint8))
    checkpoint = Checkpoint("pretrained", tmp_path)
    (before,) = (file.describe() for file in Inputs.of([tensor, tensor], checkpoint).files.values())
    assert (before["path"], before["size"]) == ("x.bin", size + 3)
    content = path.read_bytes()
    for place in (0, size + 2):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert Inputs.of([tensor], checkpoint).files[path].describe() != before
    path.write_bytes(content)
    assert Inputs.of([tensor], checkpoint).files[path].describe() == before


def test_a_file_that_is_written_to_or_removed_meanwhile_is_named(tmp_path: Path) -> None:
    path = tmp_path / "global_step8" / "x.bin"
    path.parent.mkdir()
    source = Inputs.of([store(path, torch.zeros(1000))], Checkpoint("pretrained", tmp_path))
    source.require_unchanged()
    content, status = path.read_bytes(), path.stat()
    path.write_bytes(content[:500] + b"x" + content[501:])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(CheckpointError, match=r"global_step8/x\.bin was written to"):
        source.require_unchanged()
    path.unlink()
    with pytest.raises(CheckpointError, match=r"global_step8/x\.bin was written to"):
        source.require_unchanged()
