"""How fast GPUs of one kind reach each other and the host; assumptions, not in the catalogue.

A card is taken to have the links of the machines that it is usually sold in, eight to a machine.
Bandwidths are peaks in one direction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from autobatch.gpus.catalogue import GpuSpec

__all__ = ["GPUS_A_NODE", "Links", "links_of"]

GPUS_A_NODE = 8
"""GPUs of one machine; more than that are taken to be in several."""

_NVLINK = {
    "v100": 150e9,
    "a100": 300e9,
    "h100-80gb": 450e9,
    "gh200": 450e9,
    "h200": 450e9,
    "b200": 900e9,
}
"""By beginning of the name: half of what NVIDIA's data sheets say of NVLink for both directions
(V100 SXM2 300 GB/s, A100 SXM 600, H100 and H200 SXM 900, B200 1800)."""

_PCIE = {6: 16e9, 7: 16e9, 8: 32e9, 9: 64e9, 10: 64e9, 12: 64e9}
"""By major compute capability: 16 lanes of PCI Express 3, 4 or 5 (data sheets of the cards)."""

_HOST = {
    "rtx-4060": 16e9,
    "gh200": 450e9,
    "gb10": 136.5e9,
}
"""By beginning of the name: cards that reach the host otherwise than over 16 lanes.

The RTX 4060 has 8 lanes of PCI Express 4 (AD107, NVIDIA's Ada architecture white paper). The GH200
has NVLink-C2C, 900 GB/s in both directions (data sheet). The GB10 shares its memory of 273 GB/s
with the host, and a copy reads and writes it.
"""

_NETWORK = {7: 50e9, 8: 200e9, 9: 400e9, 10: 400e9}
"""By major compute capability: the network of NVIDIA's DGX machine, all adapters together (DGX-1:
4 x 100 Gb/s, DGX A100: 8 x 200 Gb/s, DGX H100 and B200: 8 x 400 Gb/s, user guides)."""

_HOST_MEMORY = 51e9
"""Of the memory of the host, for each GPU: an eighth of that of NVIDIA's DGX A100 (user guide: two
EPYC 7742, with eight channels of DDR4 of 25.6 GB/s each)."""

_ETHERNET = 12.5e9
"""Of machines with cards that have no NVLink: one adapter of 100 Gb/s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """Bandwidths in bytes/s, and where they are from.

    Attributes:
        gpu_bytes_per_s: from one GPU to another in its machine, one direction.
        node_bytes_per_s: of a machine's network, one direction.
        host_bytes_per_s: between a GPU and the memory of its host, one direction.
        host_memory_bytes_per_s: that ops of the host have for each GPU.
        what: the links between GPUs in words.
    """

    gpu_bytes_per_s: float
    node_bytes_per_s: float
    host_bytes_per_s: float
    what: str
    host_memory_bytes_per_s: float = _HOST_MEMORY

    def bytes_per_s(self, ranks: int) -> float:
        """Return the bandwidth that a ring over so many ranks has at best."""
        if ranks <= GPUS_A_NODE:
            return self.gpu_bytes_per_s
        return min(self.gpu_bytes_per_s, self.node_bytes_per_s)


def links_of(gpu: GpuSpec) -> Links:
    """Return the links that a card is assumed to have.

    >>> from autobatch.gpus.catalogue import find_gpu
    >>> links_of(find_gpu("a100-80gb")).what
    'NVLink'
    >>> links_of(find_gpu("rtx-4090")).bytes_per_s(2)
    32000000000.0
    >>> links_of(find_gpu("t4")).host_bytes_per_s
    16000000000.0
    """
    major = gpu.compute_capability[0]
    pcie = _PCIE.get(major, 32e9)
    host = _of_name(gpu, _HOST) or pcie
    nvlink = _of_name(gpu, _NVLINK)
    if nvlink is not None:
        return Links(
            gpu_bytes_per_s=nvlink,
            node_bytes_per_s=_NETWORK.get(major, _ETHERNET),
            host_bytes_per_s=host,
            what="NVLink",
        )
    return Links(
        gpu_bytes_per_s=pcie,
        node_bytes_per_s=_ETHERNET,
        host_bytes_per_s=host,
        what="PCI Express",
    )


def _of_name(gpu: GpuSpec, speeds: Mapping[str, float]) -> float | None:
    return next((speed for name, speed in speeds.items() if gpu.name.startswith(name)), None)
