"""What single ops allocate while they run: results, scratch, copies in another layout.

A row is a few ops on tensors of given shapes. Each op runs once to warm up, as its library may then
load kernels and search a plan, and once more; the allocator records both. Events are split by its
counters, as `HistoryRecorder` does. Invariant: a row that fails keeps its error, and others go on.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from autobatch.memory.snapshot import TraceEvent
from autobatch.support.torch_private import TorchDispatchMode, tree_leaves
from autobatch.support.units import GIB
from reports.common.results import one_line

Facts = dict[str, Any]
Play = Callable[[str, Callable[[], Any]], Any]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LIMIT_BYTES = 8 * GIB
_ROWS, _SECONDS = 40, 4.0
"""Rows are recorded together until there are so many, or until they have taken so long."""
_ERRORS = 15
"""So many rows in a row that fail: the card no longer answers."""
_RESERVED_BYTES = 24 * GIB
"""The allocator's cache is emptied between groups when it holds more."""


@dataclass(frozen=True, slots=True)
class Row:
    """Ops in words, and what runs them: `run(play, device)` calls `play(name, op)` for each."""

    facts: Facts
    run: Callable[[Play, torch.device], None]


@dataclass(slots=True)
class _Played:
    name: str
    first: tuple[int, int]  # events of the first call: from, to
    again: tuple[int, int]
    outputs: list[tuple[int, Facts]]
    peak_bytes: int


def record(rows: Iterable[Row], card: Any, keep: Callable[[Facts], None], deadline: float) -> None:
    """Record rows on a card, hand each to `keep`, and stop at a time of `time.monotonic`."""
    failed = 0
    has_history = True
    left: Iterator[Row] = iter(rows)
    while time.monotonic() < deadline and failed < _ERRORS:
        group: list[tuple[Row, list[_Played], str | None]] = []
        events: Sequence[TraceEvent] | None = None
        error: str | None = None
        try:
            if card.stats().reserved_bytes > _RESERVED_BYTES:
                card.empty_cache()
            history = card.recording() if has_history else contextlib.nullcontext()
            with card.selected(), history:
                first = card.stats().events
                until = min(time.monotonic() + _SECONDS, deadline)
                for row in left:
                    played, problem = _run(row, card, first)
                    group.append((row, played, problem))
                    failed = failed + 1 if problem else 0
                    if len(group) >= _ROWS or time.monotonic() > until or failed >= _ERRORS:
                        break
                if has_history:
                    events = _events(card, card.stats().events - first)
        except Exception as reason:  # outputs and peaks are known all the same
            error = one_line(reason)
            failed += 1
            has_history = False
        for row, played, problem in group:
            facts = {op.name: _told(op, events) for op in played}
            keep({**row.facts, "error": problem or error, "ops": facts})
        if not group:
            if error is not None:
                keep({"error": error, "ops": {}})
                continue
            return


def _events(card: Any, count: int) -> Sequence[TraceEvent]:
    """Return the last events, as many as the allocator's counters say there were."""
    trace = card.snapshot().traces.get(card.index, ())
    events = [event for event in trace if event.action in ("alloc", "free_requested")]
    if len(events) < count:
        raise RuntimeError(f"{len(events)} events were recorded of {count}")
    return events[len(events) - count :]


def _run(row: Row, card: Any, first: int) -> tuple[list[_Played], str | None]:
    played: list[_Played] = []

    def play(name: str, op: Callable[[], Any]) -> Any:
        begun = card.stats().events
        result = op()
        done = card.stats().events
        del result
        card.reset_peaks()
        before = card.stats()
        result = op()
        after = card.stats()
        played.append(
            _Played(
                name=name,
                first=(begun - first, done - first),
                again=(before.events - first, after.events - first),
                outputs=[_output(leaf) for leaf in tree_leaves(result) if _is_tensor(leaf)],
                peak_bytes=after.peak_allocated_bytes - before.allocated_bytes,
            )
        )
        return result

    try:
        row.run(play, card.device)
    except Exception as error:
        return played, one_line(error)
    return played, None


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)


def _output(tensor: torch.Tensor) -> tuple[int, Facts]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), {
        "shape": list(tensor.shape),
        "stride": list(tensor.stride()),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "bytes": storage.nbytes(),
    }


def _told(op: _Played, events: Sequence[TraceEvent] | None) -> Facts:
    facts: Facts = {"outputs": [o for _, o in op.outputs], "peak_bytes": op.peak_bytes}
    if events is None:
        return {"allocations": None, **facts}
    addresses = [address for address, _ in op.outputs]
    again = _allocations(events[slice(*op.again)], addresses)
    first = _allocations(events[slice(*op.first)], ())
    if [size for size, _ in first] != [size for size, _ in again]:
        facts["first"] = first
    return {"allocations": again, **facts}


def _allocations(events: Sequence[TraceEvent], outputs: Sequence[int]) -> list[tuple[int, str]]:
    """Return bytes asked for in order, each "freed" in the op, an output's number, or "kept"."""
    found: list[tuple[int, str]] = []
    live: dict[int, int] = {}
    for event in events:
        if event.action == "alloc":
            live[event.address] = len(found)
            found.append((event.size_bytes, "freed"))
        else:
            live.pop(event.address, None)
    for address, index in live.items():
        end = f"output {outputs.index(address)}" if address in outputs else "kept"
        found[index] = (found[index][0], end)
    return found


# What is asked


def kernels() -> Iterator[Row]:
    """Yield the rows, the most telling first."""
    fast = ("default", "flash", "efficient")
    yield from _attention(["bf16"], fast, [0.0])
    yield from _linear()
    yield from _layer_norm()
    yield from _embedding()
    yield from _reductions()
    yield from _cross_entropy()
    yield from _dropout()
    yield from _attention(["bf16"], ["cudnn"], [0.0])
    yield from _attention(["bf16"], (*fast, "math", "cudnn"), [0.1])
    yield from _attention(["fp16"], (*fast, "cudnn"), [0.0, 0.1])
    yield from _attention(["fp32"], ("default", "efficient"), [0.0, 0.1])


def _row(op: str, run: Callable[[Play, torch.device], None], **words: Any) -> Row:
    return Row({"op": op, **words}, run)


_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
_HEADS = ((2, 12, 1024, 64), (16, 12, 1024, 64), (2, 32, 2048, 128), (4, 12, 197, 64))


class _Names(TorchDispatchMode):
    """Remembers which ops run."""

    def __init__(self, names: list[str]):
        super().__init__()  # type: ignore[no-untyped-call]
        self._names = names

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def _attention(
    dtypes: Sequence[str], backends: Sequence[str], dropouts: Sequence[float]
) -> Iterator[Row]:
    for backend in backends:
        for dropout in dropouts:
            for dtype in dtypes:
                for shape in _HEADS:
                    for causal in (True, False):
                        yield _attention_row(shape, dtype, backend, dropout, causal)


def _attention_row(
    shape: tuple[int, ...], dtype: str, backend: str, dropout: float, causal: bool
) -> Row:
    facts: Facts = {"op": "scaled_dot_product_attention", "shape": list(shape), "dtype": dtype}
    facts |= {"backend": backend, "dropout": dropout, "causal": causal, "chosen": []}

    def run(play: Play, device: torch.device) -> None:
        q, k, v = (
            torch.randn(shape, device=device, dtype=DTYPES[dtype], requires_grad=True)
            for _ in range(3)
        )
        gradient = torch.empty(shape, device=device, dtype=DTYPES[dtype])
        only = sdpa_kernel(_BACKENDS[backend]) if backend in _BACKENDS else contextlib.nullcontext()

        def forward() -> torch.Tensor:
            return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal)

        with only:
            with _Names(facts["chosen"]):
                _gradients(forward(), (q, k, v), gradient)
            out = play("forward", forward)
            play("backward", lambda: _gradients(out, (q, k, v), gradient))

    return Row(facts, run)


def _gradients(out: torch.Tensor, of: Sequence[torch.Tensor], gradient: torch.Tensor) -> Any:
    return torch.autograd.grad(out, of, gradient, retain_graph=True)


def _both_ways(
    play: Play, forward: Callable[[], torch.Tensor], of: Sequence[torch.Tensor], name: str = ""
) -> None:
    out = play(f"{name}forward", forward)
    gradient = torch.ones_like(out)
    play(f"{name}backward", lambda: _gradients(out, of, gradient))


def _linear() -> Iterator[Row]:
    for dtype in ("bf16", "fp32", "fp16"):
        for shape, wide in (
            ((2, 1024, 768), 2304),
            ((8, 1024, 768), 3072),
            ((8, 1024, 3072), 768),
            ((2, 1024, 768), 50257),
            ((64, 768), 10),
            ((4, 197, 768), 768),
            ((2, 2048, 4096), 11008),
        ):

            def run(play: Play, device: torch.device, s=shape, o=wide, d=dtype) -> None:  # type: ignore[no-untyped-def]
                how: Any = {"device": device, "dtype": DTYPES[d], "requires_grad": True}
                x, w, b = torch.ones(s, **how), torch.ones(o, s[-1], **how), torch.ones(o, **how)
                _both_ways(play, lambda: F.linear(x, w, b), (x, w, b), "linear, bias, ")
                _both_ways(play, lambda: F.linear(x, w), (x, w), "linear, ")
                flat = x.detach().view(-1, s[-1])
                play("addmm", lambda: torch.addmm(b.detach(), flat, w.detach().t()))
                play("mm", lambda: torch.mm(flat, w.detach().t()))
                play("matmul 3-D", lambda: torch.matmul(x.detach(), w.detach().t()))

            yield _row("linear", run, shape=list(shape), out=wide, dtype=dtype)
    for dtype in ("bf16", "fp32"):

        def run_bmm(play: Play, device: torch.device, d=dtype) -> None:  # type: ignore[no-untyped-def]
            x = torch.ones(24, 1024, 64, device=device, dtype=DTYPES[d])
            play("bmm", lambda: torch.bmm(x, x.transpose(1, 2)))
            image = torch.ones(8, 64, 56, 56, device=device, dtype=DTYPES[d], requires_grad=True)
            w = torch.ones(64, 64, 3, 3, device=device, dtype=DTYPES[d], requires_grad=True)
            b = torch.ones(64, device=device, dtype=DTYPES[d], requires_grad=True)
            conv: Any = lambda: F.conv2d(image, w, b, padding=1)  # noqa: E731
            _both_ways(play, conv, (image, w, b), "conv2d, bias, ")

        yield _row("bmm (24, 1024, 64); conv2d 64->64 at 56, batch 8", run_bmm, dtype=dtype)


def _layer_norm() -> Iterator[Row]:
    aten = torch.ops.aten
    for dtype in ("fp32", "bf16"):
        for cols in (768, 1024, 4096):
            for rows in (1024, 2048, 4096, 8192, 16384, 65536):

                def run(play: Play, device: torch.device, n=rows, c=cols, d=dtype) -> None:  # type: ignore[no-untyped-def]
                    x = torch.ones(n, c, device=device, dtype=DTYPES[d])
                    w, b = x[0].clone(), x[0].clone()
                    out, mean, rstd = play(
                        "forward", lambda: torch.native_layer_norm(x, (c,), w, b, 1e-5)
                    )
                    for mask in ([True, True, True], [True, False, False]):
                        play(
                            f"backward {mask}",
                            lambda m=mask: aten.native_layer_norm_backward(
                                out, x, [c], mean, rstd, w, b, m
                            ),
                        )

                yield _row("native_layer_norm", run, shape=[rows, cols], dtype=dtype)


def _embedding() -> Iterator[Row]:
    aten = torch.ops.aten
    for dtype in ("fp32", "bf16"):
        for tokens in (512, 2048, 3072, 3073, 8192, 32768):

            def run(play: Play, device: torch.device, n=tokens, d=dtype) -> None:  # type: ignore[no-untyped-def]
                table = torch.ones(50257, 768, device=device, dtype=DTYPES[d], requires_grad=True)
                places = torch.randint(50257, (n,), device=device)
                g = torch.ones(n, 768, device=device, dtype=DTYPES[d])
                play("embedding", lambda: aten.embedding(table.detach(), places))
                play(
                    "embedding_dense_backward",
                    lambda: aten.embedding_dense_backward(g, places, 50257, -1, False),
                )
                wide = places[:, None].expand(n, 768).contiguous()
                select: Any = lambda: table.index_select(0, places)  # noqa: E731
                _both_ways(play, select, (table,), "index_select ")
                _both_ways(play, lambda: table[places], (table,), "index ")
                _both_ways(play, lambda: table.gather(0, wide), (table,), "gather ")

            yield _row("embedding", run, tokens=tokens, vocabulary=50257, width=768, dtype=dtype)


def _reductions() -> Iterator[Row]:
    for dtype in ("fp32", "bf16"):
        for cols in (768, 3072, 10, 4096, 50257):
            for rows in (2048, 8192, 512, 4096, 16384, 19072, 65536):
                if rows * cols * (4 if dtype == "fp32" else 2) > LIMIT_BYTES // 2:
                    continue

                def run(play: Play, device: torch.device, n=rows, c=cols, d=dtype) -> None:  # type: ignore[no-untyped-def]
                    x = torch.ones(n, c, device=device, dtype=DTYPES[d])
                    play("sum(0)", lambda: x.sum(0))
                    play("sum(0, keepdim)", lambda: x.sum(0, keepdim=True))
                    play("sum(1)", lambda: x.sum(1))
                    play("sum((0, 1))", lambda: x.sum((0, 1)))
                    play("sum()", lambda: x.sum())
                    play("mean()", lambda: x.mean())
                    play("amax()", lambda: x.amax())
                    play("amax(0)", lambda: x.amax(0))
                    play("norm", lambda: torch.linalg.vector_norm(x))
                    play("foreach_norm", lambda: torch._foreach_norm([x, x[0]]))
                    if d == "bf16":
                        play("sum(0, fp32)", lambda: x.sum(0, dtype=torch.float32))

                yield _row("reductions", run, shape=[rows, cols], dtype=dtype)


def _cross_entropy() -> Iterator[Row]:
    for dtype in ("fp32", "bf16"):
        for classes in (50257, 1000, 10):
            for rows in (2048, 512, 16384):

                def run(play: Play, device: torch.device, n=rows, c=classes, d=dtype) -> None:  # type: ignore[no-untyped-def]
                    x = torch.ones(n, c, device=device, dtype=DTYPES[d], requires_grad=True)
                    y = torch.randint(c, (n,), device=device)
                    _both_ways(play, lambda: F.cross_entropy(x, y), (x,))

                yield _row("cross_entropy", run, shape=[rows, classes], dtype=dtype)


def _dropout() -> Iterator[Row]:
    for dtype in ("fp32", "bf16"):
        for shape in ((2, 1024, 768), (64, 4096), (3, 7)):

            def run(play: Play, device: torch.device, s=shape, d=dtype) -> None:  # type: ignore[no-untyped-def]
                x = torch.ones(s, device=device, dtype=DTYPES[d], requires_grad=True)
                _both_ways(play, lambda: F.dropout(x, 0.1), (x,))

            yield _row("dropout", run, shape=list(shape), dtype=dtype)
