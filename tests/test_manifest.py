"""The manifest lists every file, is the same each time, and is not believed when it is damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporter.errors import VerificationError
from exporter.manifest import MANIFEST_NAME, Manifest, read_manifest_files
from exporter.shards import WrittenFile

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
