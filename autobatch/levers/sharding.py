"""What several GPUs share: nothing (DDP), or parameters, gradients and state (FSDP2)."""

from __future__ import annotations

from functools import partial

from autobatch.levers.code import ShardingCode
from autobatch.levers.lever import Lever, Option
from autobatch.levers.naming import blocks_in_order, expression_of
from autobatch.levers.precision import WITHOUT_AUTOCAST, has_bfloat16, is_float32
from autobatch.levers.setup import Setup
from autobatch.workload.blocks import repeated_blocks
from autobatch.workload.workload import Sharding
from autobatch.workload.wrappers import is_data_parallel

__all__ = ["SHARDING"]

_DDP = """\
from torch.nn.parallel import DistributedDataParallel
model = DistributedDataParallel(model)"""


def _options(setup: Setup) -> list[Option]:
    workload = setup.workload
    if workload.world_size == 1 or workload.window is not None:
        return []
    if is_data_parallel(workload.model) or workload.shares == "custom":
        return []  # the user's own, with settings of theirs
    options = []
    if workload.shares != "fsdp":
        options.append(
            _option(
                "FSDP2",
                "Each GPU keeps its share of parameters, gradients and optimizer state, and "
                "gathers a block's parameters for its forward and its backward pass.",
                _code(setup, ""),
                "fsdp",
            )
        )
    else:
        options.append(
            _option("DDP", "Each GPU keeps all of the model and its state.", _DDP, "ddp")
        )
    if not workload.gradient_as_bucket_view:
        options.append(
            Option(
                lever="sharding",
                value="DDP, gradients in its buckets",
                what="Gradients are views of the buckets in which DDP averages them, instead of "
                "copies beside them.",
                code=_DDP.replace("(model)", "(model, gradient_as_bucket_view=True)"),
                apply=lambda setup: setup.having(sharding="ddp", gradient_as_bucket_view=True),
            )
        )
    offloaded = _code(setup, ", offload_policy=CPUOffloadPolicy()").replace(
        "import fully_shard", "import CPUOffloadPolicy, fully_shard"
    )
    options.append(
        _option(
            "FSDP2, offloaded",
            "As FSDP2, and each GPU's share waits in the host's memory, where the update runs: "
            "slow, and little is left on the card.",
            offloaded,
            ShardingCode(offloaded),
        )
    )
    if is_float32(setup) and has_bfloat16(setup.gpu):
        options.append(_in_bfloat16(setup))
    kept = _code(setup, ", reshard_after_forward=False")
    options.append(
        _option(
            "FSDP2, kept after forward",
            "As FSDP2, but parameters that were gathered for the forward pass stay until the "
            "backward pass: half as many gathers, more memory.",
            kept,
            ShardingCode(kept),
        )
    )
    return options


def _in_bfloat16(setup: Setup) -> Option:
    lines = [
        "import torch",
        _code(setup, ", mp_policy=bf16").replace(
            "import fully_shard\n",
            "import MixedPrecisionPolicy, fully_shard\n"
            "bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)\n",
        ),
    ]
    if setup.workload.autocast is not None:
        lines.append(WITHOUT_AUTOCAST)
    code = "\n".join(lines)
    return Option(
        lever="sharding",
        value="FSDP2 in bfloat16",
        what="As FSDP2, and parameters are gathered and computed with in bfloat16, in place of "
        "autocast; shares, reductions and the update stay in float32.",
        code=code,
        changes_numerics=True,
        excludes=frozenset(("precision",)),
        apply=partial(Setup.having, sharding=ShardingCode(code), autocast=None),
    )


def _code(setup: Setup, arguments: str) -> str:
    model = setup.model
    lines = ["from torch.distributed.fsdp import fully_shard"]
    by_id = {id(module): name for name, module in model.named_modules()}
    blocks = repeated_blocks(model)
    outer = blocks_in_order(model)
    if len(outer) == len(blocks):
        named = expression_of(model, outer)
    else:  # one inside another: inner ones first, as they are
        names = ", ".join(f'"{by_id[id(block)]}"' for block in blocks)
        named = f"[model.get_submodule(name) for name in ({names},)]"
    if blocks:
        lines.append(f"for block in {named}:\n    fully_shard(block{arguments})")
    lines.append(f"fully_shard(model{arguments})")
    return "\n".join(lines)


def _option(value: str, what: str, code: str, sharding: Sharding) -> Option:
    return Option(
        lever="sharding",
        value=value,
        what=what,
        code=code,
        apply=partial(Setup.having, sharding=sharding),
    )


SHARDING = Lever(
    name="sharding",
    what="Share more or less of the model out over several GPUs.",
    options=_options,
)
