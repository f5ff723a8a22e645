"""Recordings of training steps with stacks, made by the simulated allocator."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from autobatch.memory.allocator import OutOfMemory
from autobatch.memory.allocator_settings import AllocatorSettings
from autobatch.memory.segments import Block
from autobatch.support.units import MIB
from tests.support.recordings import Recorder, plain

SITE = "/venv/lib/python3.12/site-packages/torch"


def frame(name: str, filename: str = "??", line: int = 0) -> dict[str, Any]:
    return {"name": name, "filename": filename, "line": line}


TRAIN = frame("train", "/home/me/run/train.py", 30)
STEP = [
    frame("step", f"{SITE}/optim/sgd.py", 80),
    frame("wrapper", f"{SITE}/optim/optimizer.py", 500),
    TRAIN,
]
INIT_STATE = [frame("_init_group", f"{SITE}/optim/adam.py", 170), *STEP]
ZERO_GRAD = [frame("zero_grad", f"{SITE}/optim/optimizer.py", 900), TRAIN]
ENGINE = [
    frame("at::_ops::mm::redispatch(c10::DispatchKeySet, at::Tensor const&)"),
    frame("at::_ops::mm::call(at::Tensor const&, at::Tensor const&)"),
    frame("torch::autograd::generated::MmBackward0::apply(std::vector<at::Tensor>&&)"),
    frame("torch::autograd::Engine::thread_main(std::shared_ptr<GraphTask> const&)"),
    frame("start_thread", "./nptl/pthread_create.c", 442),
]
ACCUMULATE = [frame("void torch::autograd::AccumulateGrad::accumulateGrad<X>(at::Tensor)"), *ENGINE]
CALL = frame("_call_impl", f"{SITE}/nn/modules/module.py", 1790)
FORWARD = [
    frame("at::_ops::relu::call(at::Tensor const&)"),
    frame("forward", "/home/me/run/model.py", 12),
    CALL,
    TRAIN,
]
RECOMPUTE = [FORWARD[0], FORWARD[1], CALL, frame("unpack_hook", f"{SITE}/utils/checkpoint.py", 9)]
EMPTY_CACHE = [frame("empty_cache", f"{SITE}/cuda/memory.py", 220), TRAIN]
LOSS = [frame("at::_ops::mse_loss::call(at::Tensor const&)"), TRAIN]
MODULE_TO = [frame("convert", f"{SITE}/nn/modules/module.py"), TRAIN]
WORKSPACE = [frame("at::cuda::getNewWorkspace()"), *FORWARD]


class StackRecorder(Recorder):
    """An allocator that also writes down stacks, times and labels."""

    def record(self) -> None:
        super().record()
        self.stack: list[dict[str, Any]] = []
        self.label = ""
        self.device_free: int | None = None

    def note(
        self, action: str, address: int, size: int, stream: int, pool_id: tuple[int, int]
    ) -> None:
        super().note(action, address, size, stream, pool_id)
        event = self.events[-1]
        event["time_us"] = len(self.events)
        if action == "oom":
            del event["addr"]
            if self.device_free is not None:
                event["device_free"] = self.device_free
        if self.stack:
            event["frames"] = self.stack
        if self.label:
            event["user_metadata"] = self.label

    def at(self, stack: list[dict[str, Any]], size: int, stream: int = 0) -> Block:
        self.stack = stack
        return self.alloc(size, stream)

    def free_at(self, stack: list[dict[str, Any]], *blocks: Block) -> None:
        self.stack = stack
        for block in blocks:
            self.free(block)

    def content(self) -> dict[str, Any]:
        """Return what `torch.cuda.memory._snapshot()` would, with the stacks of live blocks."""
        born = {e["addr"]: e.get("frames", []) for e in self.events if e["action"] == "alloc"}
        content = plain(self.dump())
        for part in content["segments"]:
            for block in part["blocks"]:
                if block["state"] != "inactive":
                    block["frames"] = born.get(block["address"], [])
        return content


def stack_recorder(
    settings: AllocatorSettings | None = None, capacity: int | None = None
) -> StackRecorder:
    made = StackRecorder(settings, capacity_bytes=capacity)
    made.record()
    return made


def training_steps(made: StackRecorder, steps: int = 2) -> None:
    """Two parameters, Adam, one layer with an activation and temporaries everywhere."""
    parameters = [made.at(MODULE_TO, 4 * MIB), made.at(MODULE_TO, 12 * MIB)]
    states: list[Block] = []
    for step in range(steps):
        temporary = made.at(FORWARD, 6 * MIB)
        activation = made.at(FORWARD, 24 * MIB)
        if step == 0:
            made.at(WORKSPACE, 8 * MIB)
        made.free_at(FORWARD, temporary)
        loss = made.at(LOSS, 512)
        scratch = made.at(ENGINE, 5 * MIB)
        gradients = [made.at(ENGINE, 12 * MIB), made.at(ACCUMULATE, 4 * MIB)]
        made.free_at(ENGINE, activation, scratch)
        if step == 0:
            states = [made.at(INIT_STATE, 2 * 12 * MIB), made.at(INIT_STATE, 2 * 4 * MIB)]
        square_root = made.at(STEP, 12 * MIB)
        made.free_at(STEP, square_root)
        made.free_at(ZERO_GRAD, *gradients)
        made.free_at([TRAIN], loss)
    assert parameters and states


def out_of_memory(*, device_free: int | None = 2 * MIB) -> StackRecorder:
    """Ask for 17 MiB where every free block has at most 11 MiB, and nothing more can be had.

    Ordinary segments of 20 MiB hold two blocks of 9 MiB, of which one stays. The blocks that go
    are neighbours in an expandable segment, which has room for 18 MiB there.
    """
    made = stack_recorder(capacity=4 * 20 * MIB)
    made.device_free = device_free
    blocks = [made.at(FORWARD, 9 * MIB) for _ in range(8)]
    made.free_at(FORWARD, blocks[1], blocks[2])
    with suppress(OutOfMemory):
        made.at(ENGINE, 17 * MIB)
    return made
