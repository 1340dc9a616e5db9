"""Checksums of pieces combine to those of the whole, as zlib computes them."""

from __future__ import annotations

import random
import zlib
from pathlib import Path

import pytest

from exporter.checksums import check_members
from exporter.errors import CheckpointError
from exporter.tensors import Member, Piece


def piece(content: bytes, start: int, stop: int) -> Piece:
    return Piece(start, stop - start, zlib.crc32(content[start:stop]))


@pytest.mark.parametrize(
    "cuts",
    [
        pytest.param([(10, 40), (40, 90)], id="without gaps"),
        pytest.param([(60, 80), (20, 30)], id="with gaps, in any order"),
        pytest.param([(10, 50), (10, 50), (50, 90)], id="a piece twice"),
        pytest.param([(10, 50), (30, 90)], id="overlapping"),
        pytest.param([], id="nothing"),
    ],
)
def test_a_member_is_checked_from_its_pieces(cuts: list[tuple[int, int]], tmp_path: Path) -> None:
    content = random.Random(6).randbytes(100)
    path = tmp_path / "file.pt"
    path.write_bytes(content)
    pieces = [piece(content, *cut) for cut in cuts]
    right = Member(path, 10, 80, zlib.crc32(content[10:90]))
    assert check_members({right: pieces}) == 1
    wrong = Member(path, 10, 80, zlib.crc32(content[10:90]) ^ 1)
    with pytest.raises(CheckpointError, match=r"file\.pt is damaged: .* bytes 10 to 90"):
        check_members({wrong: pieces})
