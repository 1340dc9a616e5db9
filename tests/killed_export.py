"""Runs the export command many times from one process that has everything imported, and kills it where it is told.

Reads one JSON object a line, {"arguments": [...], "kill_at": n or null, "file_size": bytes or null}, and answers each
with {"code": the exit code, or minus the signal, "changes": the number of changes to the disk}. A run is killed just
before its n-th change, and in the middle of it if that is a write.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from exporter import cli

_CHANGES = frozenset(["os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.truncate"])


class Changes:
    """Counts the changes that this process makes to the disk, and kills it at one of them."""

    def __init__(self, kill_at: int | None) -> None:
        self.count, self.kill_at, self.lock = 0, kill_at, threading.Lock()
        self.write, self.pwrite, self.fsync = os.write, os.pwrite, os.fsync
        sys.addaudithook(self.audit)
        os.write, os.pwrite, os.fsync = self.counted_write, self.counted_pwrite, self.counted_fsync

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        opens = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event in _CHANGES or (opens and not str(arguments[0]).startswith("/dev/")):
            self.happens(lambda: None)

    def counted_write(self, descriptor: int, data: Any) -> int:
        if descriptor > 2:
            self.happens(lambda: self.write(descriptor, memoryview(data)[: len(data) // 2]))
        return self.write(descriptor, data)

    def counted_pwrite(self, descriptor: int, data: Any, offset: int) -> int:
        self.happens(lambda: self.pwrite(descriptor, memoryview(data)[: len(data) // 2], offset))
        return self.pwrite(descriptor, data, offset)

    def counted_fsync(self, descriptor: int) -> None:
        self.happens(lambda: None)
        self.fsync(descriptor)

    def happens(self, half: Callable[[], Any]) -> None:
        with self.lock:
            self.count += 1
            if self.count == self.kill_at:
                half()
                os.kill(os.getpid(), signal.SIGKILL)


def run(arguments: list[str], kill_at: int | None, file_size: int | None) -> dict[str, int]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        code = 1
        try:
            if file_size is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
            changes = Changes(kill_at)
            with contextlib.suppress(SystemExit):
                code = 0
                try:
                    cli.export.main(arguments)
                except SystemExit as ended:
                    code = int(ended.code or 0)
                    raise
            changes.write(writing, str(changes.count).encode())
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        count = pipe.read()
    return {"code": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), "changes": int(count or 0)}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    with contextlib.suppress(SystemExit):
        cli.export.main([*sys.argv[1:], "--dry_run", "--quiet"])  # imports all that a run imports
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
