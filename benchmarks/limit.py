"""The machine's own limit: the same bytes read, written and hashed, with nothing in between.

python -m benchmarks.limit OUTPUT OUTPUT_BYTES INPUT...

Every core reads parts of the inputs (what is not a hole) and writes and hashes parts of the output; the output is
flushed to the disk at the end. No part depends on another, so that nothing has to wait.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

BLOCK = 2**20
PART = 64 * BLOCK


def main() -> None:
    """Read the inputs, write the output."""
    target, size, *sources = sys.argv[1:]
    output = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reads = [pool.submit(read, *part) for source in sources for part in parts(Path(source))]
        writes = [
            pool.submit(write, output, start, min(start + PART, int(size))) for start in range(0, int(size), PART)
        ]
        for read_part in reads:
            read_part.result()
        for written_part in writes:
            written_part.result()
    os.fsync(output)
    os.close(output)


def parts(path: Path) -> Iterator[tuple[Path, int, int]]:
    """What is not a hole, cut into parts: path, first byte and the byte after the last."""
    size, stop = path.stat().st_size, 0
    with path.open("rb") as file:
        while stop < size:
            try:
                start = os.lseek(file.fileno(), stop, os.SEEK_DATA)
            except OSError:
                return
            stop = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            yield from ((path, first, min(first + PART, stop)) for first in range(start, stop, PART))


def read(path: Path, start: int, stop: int) -> None:
    """Read bytes ``start`` to ``stop``."""
    buffer = memoryview(bytearray(BLOCK))
    with path.open("rb") as file:
        for position in range(start, stop, BLOCK):
            os.preadv(file.fileno(), [buffer[: stop - position]], position)


def write(output: int, start: int, stop: int) -> str:
    """Write and hash bytes ``start`` to ``stop``, and let the disk begin with them."""
    buffer = memoryview(os.urandom(BLOCK))
    digest = hashlib.sha256()
    for position in range(start, stop, BLOCK):
        os.pwrite(output, buffer[: stop - position], position)
        digest.update(buffer[: stop - position])
    os.posix_fadvise(output, start, stop - start, os.POSIX_FADV_DONTNEED)
    return digest.hexdigest()


if __name__ == "__main__":
    main()
