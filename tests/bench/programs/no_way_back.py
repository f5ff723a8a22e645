"""A card that fills up while the user's model waits in host memory; then a second probe.

Tells what the first one said, and whether the second one brought everything back.
"""

from __future__ import annotations

import torch
from torch import nn

from autobatch.devices.cuda.gpu import CudaGpu
from autobatch.devices.cuda.runtime import CudaRuntime
from autobatch.errors import AutobatchError
from autobatch.support.units import MIB
from autobatch.workload.sample import batch_builder
from autobatch.workload.workload import Workload
from tests.bench.programs import tell

WIDTH = 2048  # a weight has 16 MiB


def main() -> None:
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))).cuda()
    before = [parameter.detach().cpu() for parameter in model.parameters()]
    workload = Workload(
        model=model,
        batch=batch_builder(torch.zeros(2, WIDTH)),
        loss=lambda model, batch: model(batch).square().mean(),
    )
    said, kept = "", []
    try:
        with CudaGpu(CudaRuntime()).hosting(workload):
            while torch.cuda.mem_get_info()[0] > 40 * MIB:
                kept.append(torch.empty(20 * MIB, dtype=torch.uint8, device="cuda"))
    except AutobatchError as error:
        said = str(error)
    empty = [not parameter.untyped_storage().nbytes() for parameter in model.parameters()]
    kept.clear()
    with CudaGpu(CudaRuntime()).hosting(workload):
        pass
    after = [parameter.detach().cpu() for parameter in model.parameters()]
    same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    tell({"said": said, "empty": empty, "same": same})


if __name__ == "__main__":
    main()
