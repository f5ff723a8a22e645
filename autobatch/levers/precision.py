"""Number formats: autocast, the format of the weights, and of matrix products."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from autobatch.gpus.catalogue import GpuSpec
from autobatch.levers.code import BatchCode, ModelCode
from autobatch.levers.lever import Lever, Option
from autobatch.levers.setup import Setup
from autobatch.workload.sample import Built
from autobatch.workload.tree import map_tensors, tensors

__all__ = ["PRECISION", "WITHOUT_AUTOCAST", "has_bfloat16", "in_dtype", "is_float32"]

_TENSOR_CORES = (8, 0)
"""The compute capability from which on cards multiply in bfloat16 and TF32."""

_WEIGHTS = "import torch\nmodel = model.to(torch.bfloat16)"

_BATCH = (
    "import torch\nfrom autobatch.levers.precision import in_dtype\n"
    "batch = in_dtype(batch, torch.bfloat16)"
)

WITHOUT_AUTOCAST = "# leave torch.autocast and GradScaler out"
"""The line of an option that takes the place of autocast."""

_BF16_AUTOCAST = 'with torch.autocast("cuda", torch.bfloat16):  # around forward and loss'

_FP16_AUTOCAST = """\
scaler = torch.amp.GradScaler("cuda")
with torch.autocast("cuda", torch.float16):  # around forward and loss
scaler.scale(loss).backward()  # in the place of loss.backward()
scaler.step(optimizer)  # in the place of optimizer.step()
scaler.update()"""


def in_dtype(batch: object, dtype: torch.dtype) -> object:
    """Return a batch whose floating-point tensors have another dtype.

    >>> image, label = in_dtype((torch.ones(2), torch.ones(2).long()), torch.bfloat16)
    >>> image.dtype, label.dtype
    (torch.bfloat16, torch.int64)
    """

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return map_tensors(cast, batch)


def has_bfloat16(gpu: GpuSpec) -> bool:
    """Return whether a card multiplies in bfloat16, and in TF32, on tensor cores.

    >>> from autobatch.gpus.catalogue import find_gpu
    >>> has_bfloat16(find_gpu("a100-40gb")), has_bfloat16(find_gpu("t4"))
    (True, False)
    """
    return gpu.compute_capability >= _TENSOR_CORES


def is_float32(setup: Setup) -> bool:
    """Return whether all floating-point parameters are in float32, of at least one."""
    return _dtypes(setup) == {torch.float32}


def _dtypes(setup: Setup) -> set[torch.dtype]:
    return {p.dtype for p in setup.model.parameters() if p.is_floating_point()}


def _options(setup: Setup) -> list[Option]:
    workload = setup.workload
    if workload.window is not None or setup.has("precision"):
        return []
    if torch.float32 not in _dtypes(setup):
        return []
    has_tensor_cores = has_bfloat16(setup.gpu)
    options = []
    if workload.autocast != "bf16" and has_tensor_cores:
        options.append(
            _option(
                "bf16 autocast",
                "Matrix products and convolutions run in bfloat16, weights stay in float32.",
                _BF16_AUTOCAST,
                "bf16=True",
                autocast="bf16",
            )
        )
    if workload.autocast != "fp16":
        options.append(
            _option(
                "fp16 autocast",
                "Matrix products and convolutions run in float16, weights stay in float32, and the "
                "loss is scaled so that small gradients do not vanish.",
                _FP16_AUTOCAST,
                "fp16=True",
                autocast="fp16",
            )
        )
    if workload.autocast is not None:
        options.append(
            _option(
                "fp32",
                "All runs in float32, the format of the weights.",
                WITHOUT_AUTOCAST,
                "bf16=False, fp16=False",
                autocast=None,
            )
        )
    elif has_tensor_cores and not setup.tf32:
        options.append(
            Option(
                lever="precision",
                value="tf32",
                what="Float32 matrix products are rounded to 10 bits of mantissa and run on tensor "
                "cores: faster, with the same memory.",
                code='torch.set_float32_matmul_precision("high")',
                trainer="tf32=True",
                changes_numerics=True,
                keeps_state=True,
                apply=partial(replace, tf32=True),
            )
        )
    if is_float32(setup) and has_tensor_cores:
        options.append(_bf16_weights(setup))
    return options


def _option(value: str, what: str, code: str, trainer: str, *, autocast: str | None) -> Option:
    return Option(
        lever="precision",
        value=value,
        what=what,
        code=code,
        trainer=trainer,
        changes_numerics=True,
        keeps_state=True,
        apply=partial(Setup.having, autocast=autocast),
    )


def _bf16_weights(setup: Setup) -> Option:
    takes_floats = _takes_floats(setup)
    lines = [_WEIGHTS]
    if takes_floats:
        lines.append(_BATCH.removeprefix("import torch\n"))
    if setup.workload.autocast is not None:
        lines.append(WITHOUT_AUTOCAST)
    return Option(
        lever="precision",
        value="bf16 weights",
        what="Weights, gradients and optimizer state are in bfloat16, too; small updates may be "
        "rounded away.",
        code="\n".join(lines),
        changes_numerics=True,
        apply=partial(_with_bf16_weights, takes_floats=takes_floats),
    )


def _takes_floats(setup: Setup) -> bool:
    """Whether batches may have floating-point tensors; only those at hand are looked at."""
    make = setup.workload.batch
    if not isinstance(make, Built):
        return True
    return any(tensor.is_floating_point() for tensor in tensors(make.rows.batch))


def _with_bf16_weights(setup: Setup, *, takes_floats: bool) -> Setup:
    setup = setup.changed(ModelCode("precision", _WEIGHTS)).having(autocast=None)
    return setup.with_batches(partial(BatchCode, text=_BATCH)) if takes_floats else setup


PRECISION = Lever(
    name="precision",
    what="Compute or keep numbers in formats of fewer bytes.",
    options=_options,
)
