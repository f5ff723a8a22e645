"""The bench plays public functions only: each has a prototype in a public header."""

from __future__ import annotations

import re
import subprocess

from tests.bench.build import built
from tests.bench.children import needs_bench
from tests.bench.installed import installed
from tests.bench.stubs import LIBRARIES

pytestmark = needs_bench

NO_HEADER = (
    "nvml"  # its header comes with no wheel; each function is in NVIDIA's NVML API Reference
)

NEVER_ANSWERED = {
    f"nvshmemid_{it}" for it in ("hostlib_finalize", "hostlib_init_attr", "init_status")
}
"""Names that the loader wants for libtorch_nvshmem.so; whoever calls them is ended."""


def exported(name: str) -> set[str]:
    command = ["nm", "-D", "--defined-only", str(built() / f"{name}.so")]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {line.split()[-1].split("@")[0] for line in listing.splitlines() if " T " in line}


def test_every_function_has_a_public_prototype() -> None:
    folders = installed().header_folders
    headers = {path for folder in folders for path in folder.rglob("*.h") if path.is_file()}
    text = "\n".join(path.read_text(errors="replace") for path in headers)
    declared = set(re.findall(r"\b\w+(?=\s*\()", text))
    # names that a header gives a newer version of a function: #define cuMemGetInfo cuMemGetInfo_v2
    declared |= set(re.findall(r"#\s*define\s+\w+\s+(?:__CUDA_API_PT\w+\()?(\w+_v\d)\b", text))
    for name in LIBRARIES:
        if name != NO_HEADER:
            assert exported(name) - declared - NEVER_ANSWERED == set(), name


def test_nothing_of_nvidias_is_copied_into_the_libraries() -> None:
    for path in built().glob("*.so"):
        assert path.stat().st_size < 400_000, path  # a few functions of ours, each
