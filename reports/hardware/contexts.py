"""What a CUDA context and the libraries in it hold, step by step in one process.

Each step uses one more library or kind of kernel; the driver's figure for the whole card, less what
the allocator has reserved, is read after it. Invariant: a step that fails keeps its error.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from reports.common.results import one_line

try:
    import triton
    import triton.language as tl
except ImportError:  # the CPU builds have none
    triton = None

Facts = dict[str, Any]

if triton is not None:

    @triton.jit
    def _one_more(x):  # type: ignore[no-untyped-def]
        places = x + tl.arange(0, 128)
        tl.store(places, tl.load(places) + 1)


def contexts(
    device: torch.device,
    look: Callable[[], int | None],
    reserved: Callable[[], int],
    keep: Callable[[Facts], None],
    before_bytes: int | None,
) -> None:
    """Run every step, and hand what the card then holds to `keep`.

    Args:
        device: where the steps run.
        look: the driver's figure for the whole card, in bytes.
        reserved: the allocator's reserved bytes.
        keep: takes a record at a time.
        before_bytes: the driver's figure before anything.
    """
    known = before_bytes
    keep({"step": "before anything", "used_bytes": before_bytes, "reserved_bytes": 0})
    for name, step in _STEPS:
        error = None
        try:
            step(device)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except Exception as reason:
            error = one_line(reason)
        used, held = look(), reserved()
        outside = None if used is None else used - held
        delta = None if outside is None or known is None else outside - known
        facts = {"step": name, "used_bytes": used, "reserved_bytes": held, "error": error}
        keep(facts | {"outside_bytes": outside, "delta_bytes": delta})
        known = outside


def _context(device: torch.device) -> None:
    torch.empty(1, device=device)


def _elementwise(device: torch.device) -> None:
    torch.ones(1000, device=device).add_(1)


def _reduction(device: torch.device) -> None:
    torch.ones(1000, 100, device=device).sum()


def _sort(device: torch.device) -> None:
    torch.rand(100_000, device=device).sort()


def _matmul(device: torch.device) -> None:
    x = torch.ones(512, 512, device=device)
    torch.mm(x, x)


def _matmul_bf16(device: torch.device) -> None:
    x = torch.ones(512, 512, device=device, dtype=torch.bfloat16)
    torch.mm(x, x)


def _linear_bf16(device: torch.device) -> None:
    x = torch.ones(512, 512, device=device, dtype=torch.bfloat16)
    F.linear(x, x, x[0])


def _attention(backend: SDPBackend) -> Callable[[torch.device], None]:
    def step(device: torch.device) -> None:
        q = torch.ones(2, 4, 256, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
        with sdpa_kernel(backend):
            F.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()

    return step


def _convolution(dtype: torch.dtype) -> Callable[[torch.device], None]:
    def step(device: torch.device) -> None:
        x = torch.ones(4, 32, 32, 32, device=device, dtype=dtype, requires_grad=True)
        w = torch.ones(32, 32, 3, 3, device=device, dtype=dtype, requires_grad=True)
        F.conv2d(x, w, padding=1).sum().backward()

    return step


def _layer_norm(device: torch.device) -> None:
    x = torch.ones(64, 768, device=device, requires_grad=True)
    F.layer_norm(x, (768,)).sum().backward()


def _adamw(**how: bool) -> Callable[[torch.device], None]:
    def step(device: torch.device) -> None:
        p = torch.nn.Parameter(torch.ones(1000, device=device))
        p.grad = torch.ones_like(p)
        torch.optim.AdamW([p], **how).step()

    return step


def _fft(device: torch.device) -> None:
    torch.fft.fft(torch.ones(64, 1000, device=device))


def _cholesky(device: torch.device) -> None:
    torch.linalg.cholesky(torch.eye(128, device=device))


def _svd(device: torch.device) -> None:
    torch.linalg.svd(torch.rand(128, 128, device=device))


def _sparse(device: torch.device) -> None:
    x = torch.eye(128, device=device)
    torch.sparse.mm(x.to_sparse_csr(), x)


def _triton(device: torch.device) -> None:
    if triton is None:
        raise ImportError("triton is not installed")
    _one_more[(1,)](torch.ones(128, device=device))


def _graph(device: torch.device) -> None:
    x = torch.ones(1000, device=device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.add_(1)
    graph.replay()
    torch.cuda.synchronize(device)


def _nccl(device: torch.device) -> None:
    dist = torch.distributed
    folder = tempfile.mkdtemp(prefix="autobatch-nccl-")
    dist.init_process_group(
        "nccl",
        init_method=f"file://{folder}/store",
        rank=0,
        world_size=1,
        timeout=timedelta(seconds=15),
    )
    dist.all_reduce(torch.ones(1000, device=device))


_STEPS: tuple[tuple[str, Callable[[torch.device], None]], ...] = (
    ("context", _context),
    ("elementwise", _elementwise),
    ("reduction", _reduction),
    ("sort", _sort),
    ("matmul fp32", _matmul),
    ("matmul bf16", _matmul_bf16),
    ("linear with bias bf16", _linear_bf16),
    ("attention flash", _attention(SDPBackend.FLASH_ATTENTION)),
    ("attention efficient", _attention(SDPBackend.EFFICIENT_ATTENTION)),
    ("attention math", _attention(SDPBackend.MATH)),
    ("attention cudnn", _attention(SDPBackend.CUDNN_ATTENTION)),
    ("convolution fp32", _convolution(torch.float32)),
    ("convolution bf16", _convolution(torch.bfloat16)),
    ("layer norm", _layer_norm),
    ("AdamW foreach", _adamw(foreach=True)),
    ("AdamW fused", _adamw(fused=True)),
    ("fft", _fft),
    ("cholesky", _cholesky),
    ("svd", _svd),
    ("sparse mm", _sparse),
    ("triton", _triton),
    ("CUDA graph", _graph),
    ("NCCL, one rank", _nccl),
)
