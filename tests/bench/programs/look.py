"""What PyTorch sees of the cards, and what it says when their memory runs out."""

from __future__ import annotations

import torch

from tests.bench.programs import tell


def main() -> None:
    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    weight = torch.zeros(1024, 1024, device="cuda", requires_grad=True)
    (weight @ weight).sum().backward()
    message = ""
    try:
        torch.empty(64 << 30, dtype=torch.uint8, device="cuda")
    except torch.OutOfMemoryError as error:
        message = str(error)
    sent = torch.arange(8, device="cuda:0").to(f"cuda:{len(cards) - 1}")
    seen = {
        "names": [card.name for card in cards],
        "capability": torch.cuda.get_device_capability(),
        "total": cards[0].total_memory,
        "multiprocessors": cards[0].multi_processor_count,
        "allocated": torch.cuda.memory_allocated(),
        "in_use": [total - free for free, total in map(torch.cuda.mem_get_info, range(len(cards)))],
        "message": message,
        "sent_to": str(sent.device),
    }
    tell(seen)


if __name__ == "__main__":
    main()
