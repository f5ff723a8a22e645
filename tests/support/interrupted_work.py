"""Calls that are interrupted at many moments: what becomes of each, in a line.

Usage: python -m tests.support.interrupted_work CALL SHARE...

A SHARE is a moment, as a share of the time that an undisturbed call takes. By hand, over many:

    python -m tests.support.interrupted_work tune $(for i in $(seq 40); do echo 0.$RANDOM; done)
"""

from __future__ import annotations

import _thread
import gc
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import autobatch

warnings.simplefilter("ignore")


def model() -> nn.Module:
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU(), nn.Dropout(0.1))
        for _ in range(16)
    ]
    return nn.Sequential(*blocks)


NET, SAMPLE = model(), torch.randn(4, 64)


def loss(net: nn.Module, batch: Any) -> Any:
    return net(batch).square().mean()


CALLS: dict[str, Callable[[], Any]] = {
    "tune": lambda: (
        autobatch.tune(NET, target=100003, sample=SAMPLE, loss=loss, gpu="8GiB").ceiling
    ),
    "predict": lambda: (
        autobatch.predict(
            NET, micro_batch=64, sample=SAMPLE, loss=loss, gpu="8GiB"
        ).peak_reserved_bytes
    ),
    "check": lambda: autobatch.check_equivalence(NET[0], SAMPLE, loss=loss).equivalent,
}


def state() -> tuple[Any, ...]:
    """Return what must be as before, whenever the interrupt comes."""
    return (
        signal.getsignal(signal.SIGINT),
        gc.isenabled(),
        gc.get_freeze_count(),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.cuda.is_available,
        torch.cuda.get_device_properties,
        torch.Generator,
        torch.autograd.backward,
        nn.Module._apply,
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
        [type(p) for p in NET.parameters()],
        [float(p.sum()) for p in NET.parameters()],
        all(p.grad is None for p in NET.parameters()),
        NET.training,
    )


def interrupted(share: float, call: Callable[[], Any], answer: Any, took: float) -> str:
    """Interrupt a call, and say what came of it."""
    before = state()
    sent: list[float] = []
    outcome = ""

    def fire() -> None:
        time.sleep(share * took)
        sent.append(time.perf_counter())
        os.kill(os.getpid(), signal.SIGINT)

    _thread.start_new_thread(fire, ())
    try:
        call()
        outcome = "swallowed" if sent else "finished before"
        while not sent:
            time.sleep(0.01)
        time.sleep(0.1)
    except KeyboardInterrupt:
        late = time.perf_counter() - sent[0]
        if late > 1.5:
            outcome = f"interrupted after {late:.1f} s"
        elif outcome != "finished before":
            outcome = "interrupted"
    except Exception as error:
        outcome = f"another error: {error!r:.200}"
    if state() != before:
        pairs = zip(before, state(), strict=True)
        return f"{outcome}, but changed: {[pair for pair in pairs if pair[0] != pair[1]]!r:.300}"
    if call() != answer:
        return f"{outcome}, but another answer afterwards"
    return outcome


def main(name: str, shares: list[float]) -> None:
    """Interrupt calls at moments, and print what came of each."""
    call = CALLS[name]
    call()
    started = time.perf_counter()
    answer = call()
    took = time.perf_counter() - started
    for share in shares:
        print(interrupted(share, call, answer, took), flush=True)
    time.sleep(0.5)  # threads of autograd that still drop a graph would abort at the end


if __name__ == "__main__":
    main(sys.argv[1], [float(share) for share in sys.argv[2:]])
