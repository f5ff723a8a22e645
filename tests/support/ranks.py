"""Two processes that form a gloo group, for tests of what ranks do together."""

from __future__ import annotations

import multiprocessing
import socket
import traceback
import warnings
from collections.abc import Callable
from typing import Any

SECONDS = 120.0


class Ranks:
    """Runs a function of an importable module in every rank, and returns what each returned.

    `seconds` is how long a run may take; the first one also starts the processes.
    """

    def __init__(self, size: int = 2, *, seconds: float = SECONDS) -> None:
        self._seconds, self._limit = seconds, SECONDS
        context = multiprocessing.get_context("spawn")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pairs = [context.Pipe() for _ in range(size)]
        self._pipes = [ours for ours, _ in pairs]
        self._processes = [
            context.Process(target=_serve, args=(theirs, rank, size, port), daemon=True)
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for process in self._processes:
            process.start()

    def run(self, work: Callable[..., Any], **arguments: Any) -> list[Any]:
        """Call `work(rank, **arguments)` everywhere; an error or a hang of any rank fails."""
        for pipe in self._pipes:
            pipe.send((work, arguments))
        results = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(self._limit):
                self.stop()
                raise TimeoutError(f"rank {rank} hangs in {work.__name__}({arguments})")
            good, result = pipe.recv()
            if not good:
                self.stop()
                raise RuntimeError(f"rank {rank} failed in {work.__name__}({arguments})\n{result}")
            results.append(result)
        self._limit = self._seconds
        return results

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _serve(pipe: Any, rank: int, size: int, port: int) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    while True:
        work, arguments = pipe.recv()
        try:
            with warnings.catch_warnings(record=True):
                warnings.simplefilter("always")
                answer = (True, work(rank, **arguments))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send(answer)
