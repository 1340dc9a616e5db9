"""The manifest lists every file, is the same each time, and is not believed when it is damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from exporter.errors import VerificationError
from exporter.manifest import MANIFEST_NAME, Manifest, read_manifest_files, source_files
from exporter.shards import WrittenFile
from tests.test_tensors import store

FILES = (WrittenFile("model.safetensors", 10, "a" * 64), WrittenFile("README.md", 3, "b" * 64))


def test_the_files_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    content = Manifest(FILES, {}, {}, {}, ()).dump()
    assert content == Manifest(FILES[::-1], {}, {}, {}, ()).dump()
    (tmp_path / MANIFEST_NAME).write_bytes(content)
    assert read_manifest_files(tmp_path) == (FILES[1], FILES[0])


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"files": 3}', '{"files": [{"path": "x"}]}', '{"files": [1]}']
)
def test_a_damaged_manifest_fails_the_verification(content: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).write_text(content)
    with pytest.raises(VerificationError, match=r"export\.json"):
        read_manifest_files(tmp_path)


def test_a_folder_without_a_manifest_fails_the_verification(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match=r"has no export\.json"):
        read_manifest_files(tmp_path)


@pytest.mark.parametrize("size", [1, 1000, 64 * 1024, 100_000, 200_000])
def test_a_source_is_known_by_its_size_its_start_and_its_end(size: int, tmp_path: Path) -> None:
    tensor = store(tmp_path / "x.bin", torch.randint(0, 256, (size,), dtype=torch.uint8))
    (before,) = source_files([tensor, tensor], tmp_path)
    assert (before["path"], before["size"]) == ("x.bin", size + 3)
    content = (tmp_path / "x.bin").read_bytes()
    for place in (0, size + 2):
        (tmp_path / "x.bin").write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert source_files([tensor], tmp_path) != [before]
    (tmp_path / "x.bin").write_bytes(content)
    assert source_files([tensor], tmp_path) == [before]
