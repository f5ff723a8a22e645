"""Values that are real on simulated cards: fills, copies, and what a GradScaler makes of them."""

from __future__ import annotations

import torch
from torch import nn

from tests.bench.programs import tell

TYPES = "bool uint8 int16 int32 int64 float16 bfloat16 float32 float64".split()


def main() -> None:
    stale = [torch.randint(1, 255, (n,), dtype=torch.uint8).cuda() for n in (9, 999, 9999) * 9]
    del stale
    filled = {
        name: torch.full((7,), 1, dtype=getattr(torch, name), device="cuda").cpu().tolist()
        for name in TYPES
    }
    zeros = torch.zeros_like(torch.empty(500, device="cuda")).cpu().abs().max().item()
    sent = torch.arange(100).cuda().cpu().sum().item()
    model = nn.Linear(64, 64).cuda()
    optimizer, scaler = torch.optim.AdamW(model.parameters()), torch.amp.GradScaler("cuda")
    for _ in range(2):
        with torch.autocast("cuda", torch.float16):
            loss = model(torch.zeros(8, 64, device="cuda")).sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    stepped = len(optimizer.state)
    tell({"filled": filled, "zeros": zeros, "sent": sent, "stepped": stepped})


if __name__ == "__main__":
    main()
