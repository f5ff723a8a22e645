"""The environment in which a child process runs on simulated cards.

    subprocess.run([sys.executable, "train.py"], env=environment(gpu="a100-40gb", capacity="8GiB"))

A process becomes one of the bench's when it starts, never later: the libraries are preloaded.
"""

from __future__ import annotations

import atexit
import os
import re
import tempfile
from pathlib import Path

from autobatch.gpus.catalogue import GpuSpec, find_gpu
from autobatch.support.units import parse_bytes
from tests.bench.build import ARCHITECTURES, built, preloading, reason_it_cannot_be_built
from tests.bench.cards import described

__all__ = ["environment", "reason_it_cannot_run"]

MAX_CARDS = 16

reason_it_cannot_run = reason_it_cannot_be_built


def environment(
    *,
    gpu: str | GpuSpec = "a100-40gb",
    capacity: str | int | None = None,
    cards: int = 1,
    **settings: object,
) -> dict[str, str]:
    """Return this process's environment variables, and those of the cards, for a child process.

    The first call builds the libraries. All children that get one answer share its cards, as
    processes of one machine do; another call gives other cards.

    Args:
        gpu: which card, by a name that autobatch knows, or described.
        capacity: its memory, "8GiB" or bytes; None for what the card has.
        cards: how many of them.
        **settings: other variables of the bench (README.md), lower-case and without "CARD_", such
            as `log=1` or `fail_at=100`.

    Raises:
        RuntimeError: the bench cannot run here, or PyTorch has no code for this card.
        ValueError: too many cards, or none.
    """
    if not 1 <= cards <= MAX_CARDS:
        raise ValueError(f"{cards} cards: the bench plays 1 to {MAX_CARDS}")
    spec = find_gpu(gpu) if isinstance(gpu, str) else gpu
    folder = built()
    version = _code_version(spec, (folder / ARCHITECTURES).read_text())
    variables = {
        "CARD_GPU": described(spec, version),
        "CARD_COUNT": cards,
        "CARD_SHARE": _shared_file(),
        "TRITON_LIBCUDA_PATH": folder / "driver",  # Triton links what it compiles with it
        **{f"CARD_{name.upper()}": value for name, value in settings.items()},
    }
    if capacity is not None:
        size = parse_bytes(capacity) if isinstance(capacity, str) else capacity
        variables["CARD_CAPACITY"] = size
    texts = {name: str(value) for name, value in variables.items()}
    return {**os.environ, **preloading(folder), **texts}


def _code_version(spec: GpuSpec, architectures: str) -> int:
    """Return the version of the code that PyTorch has for a card: 86 on an RTX 4090.

    Raises:
        RuntimeError: it has none.
    """
    compiled = [int(number) for number in re.findall(r"sm_(\d+)", architectures)]
    major, minor = spec.compute_capability
    runs = [each for each in compiled if each // 10 == major and each % 10 <= minor]
    if not runs:
        raise RuntimeError(
            f"this PyTorch has no code for {spec.name} of compute capability {major}.{minor}, "
            f"only for {architectures.strip()}: choose another card"
        )
    return max(runs)


def _shared_file() -> str:
    """Make the file in which processes tell each other what they hold of the cards.

    Files of makers that ended without removing theirs, as workers of tests do, are removed.
    """
    folder = Path("/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir())
    for path in folder.glob("simulated-card-*-*"):
        if not Path(f"/proc/{path.name.split('-')[2]}").exists():
            path.unlink(missing_ok=True)
    number, path_made = tempfile.mkstemp(prefix=f"simulated-card-{os.getpid()}-", dir=folder)
    os.close(number)
    atexit.register(Path(path_made).unlink, missing_ok=True)
    return path_made
