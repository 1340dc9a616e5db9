"""What is at work behind a progress bar ends with it."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from exporter.console import Abandoned, Console
from exporter.shards import Progress


def test_a_thread_ends_at_its_next_step_once_nobody_waits_for_it() -> None:
    started = threading.Event()

    def work(progress: Progress) -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            progress(1)
            started.set()

    with (
        pytest.raises(KeyboardInterrupt),
        ThreadPoolExecutor(1) as pool,
        Console(quiet=True).progress("Working", 1) as progress,
    ):
        future = pool.submit(work, progress)
        assert started.wait(30)
        raise KeyboardInterrupt
    assert isinstance(future.exception(), Abandoned)
