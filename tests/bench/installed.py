"""The PyTorch that is installed, as the bench's builder needs it: its libraries, headers, imports.

PyTorch is not imported here: its libraries would be loaded, and with them CUDA's.
"""

from __future__ import annotations

import re
import runpy
import subprocess
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

__all__ = ["Import", "Installed", "installed"]

_TOOLKIT = Path("/usr/local/cuda/include")


@dataclass(frozen=True)
class Import:
    """A function that PyTorch's libraries take from another library.

    Attributes:
        name: of the function.
        version: of the symbol, such as "libcudart.so.13"; empty where it has none.
    """

    name: str
    version: str


@dataclass(frozen=True)
class Installed:
    """One installation of PyTorch.

    Attributes:
        folder: of the package `torch`.
        version: such as "2.14.1+cu130".
        cuda: the version of CUDA that it was built for, such as "13.0"; None for a CPU build.
    """

    folder: Path
    version: str
    cuda: str | None

    @property
    def site(self) -> Path:
        """The folder with the wheels of NVIDIA's libraries."""
        return self.folder.parent

    @property
    def header_folders(self) -> list[Path]:
        """Where headers may lie: PyTorch's own CUDA first, then Triton's, then the machine's."""
        assert self.cuda is not None
        wheels = self.site / "nvidia"
        one_for_all = wheels / f"cu{self.cuda.split('.')[0]}" / "include"
        others = [
            folder
            for folder in sorted(wheels.glob("*/include"))
            if not re.fullmatch(r"cu\d+", folder.parent.name)
        ]
        triton = self.site / "triton" / "backends" / "nvidia" / "include"
        folders = [one_for_all, *others, triton, _TOOLKIT]
        return [folder for folder in folders if folder.is_dir()]

    def headers(self, *patterns: str) -> list[Path]:
        """Return the headers of the first folder that has any of these patterns."""
        for folder in self.header_folders:
            found = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
            if found:
                return found
        return []

    def libraries(self) -> list[Path]:
        """Return the libraries whose imports the bench must satisfy."""
        extensions = sorted((self.site / "torchvision").glob("*.so"))
        return [*sorted((self.folder / "lib").glob("lib*.so")), *extensions]

    def imports(self) -> set[Import]:
        """Return the functions that PyTorch's libraries take from others."""
        listing = _said("nm", "-D", "--undefined-only", *self.libraries())
        names = {line.split()[-1] for line in listing.splitlines() if line.startswith(" ")}
        return {Import(*name.replace("@@", "@").partition("@")[::2]) for name in names}

    def needed(self) -> set[str]:
        """Return the sonames of the libraries that PyTorch's libraries are linked with."""
        listing = _said("readelf", "-d", *self.libraries())
        return set(re.findall(r"\(NEEDED\).*\[(.+)\]", listing))


def _said(*command: object) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    return done.stdout


@cache
def installed() -> Installed:
    """Return this environment's PyTorch."""
    found = find_spec("torch")
    assert found is not None and found.origin is not None
    folder = Path(found.origin).parent
    version = runpy.run_path(str(folder / "version.py"))
    return Installed(folder=folder, version=version["__version__"], cuda=version["cuda"])
