"""The CRC-32 of archive members, checked with the bytes that are read anyway.

A member is read in pieces, by several writers in any order. The checksums of the pieces are combined to that of the
member.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from isal import isal_zlib

from exporter.errors import CheckpointError
from exporter.tensors import DType, Extent, Member, Piece, SourceFiles


def check_members(pieces: Mapping[Member, Iterable[Piece]]) -> int:
    """Compare the CRC-32 of each member with the one in its archive; returns the number of members that have one.

    What the pieces leave out of a member (padding) is read here.

    Raises:
        CheckpointError: a member's bytes are not those that were saved.
    """
    for member, read in pieces.items():
        if _checksum(member, read) != member.crc32:
            raise CheckpointError(
                f"{member.path.parent.name}/{member.path.name} is damaged: the CRC-32 of its bytes "
                f"{member.offset} to {member.offset + member.nbytes} is not the one that was saved with them.",
                "Copy the file again from where the training wrote it.",
            )
    return len(pieces)


def _checksum(member: Member, pieces: Iterable[Piece]) -> int:
    position, total = member.offset, 0
    for piece in sorted(set(pieces), key=lambda piece: piece.offset):
        if piece.offset < position:
            return _crc_of_file(member, member.offset, member.nbytes)
        if gap := piece.offset - position:
            total = isal_zlib.crc32_combine(total, _crc_of_file(member, position, gap), gap)
        total = isal_zlib.crc32_combine(total, piece.crc32, piece.nbytes)
        position = piece.offset + piece.nbytes
    if rest := member.offset + member.nbytes - position:
        total = isal_zlib.crc32_combine(total, _crc_of_file(member, position, rest), rest)
    return total


def _crc_of_file(member: Member, offset: int, nbytes: int) -> int:
    crc = 0
    with SourceFiles(checksums=False) as files:
        for block in files.blocks(Extent(member.path, offset, DType.U8, nbytes)):
            crc = isal_zlib.crc32(memoryview(block.numpy()), crc)
    return crc
