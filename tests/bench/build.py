"""Build the simulated runtime for the PyTorch that is installed, once.

    python -m tests.bench.build        # prints the folder with the libraries

Each library has the soname and the symbol version of the one of NVIDIA's that it plays, read from
PyTorch's own libraries, and is preloaded (`card.py`), so that PyTorch finds it already there. The
folder is named by PyTorch's version and by what the libraries are made of, and appears at once,
whole, however many processes ask for it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from tests.bench.installed import Installed, installed
from tests.bench.stubs import LIBRARIES, Library, error_table, refusals, stubs, text_of

__all__ = ["ARCHITECTURES", "built", "preloading", "reason_it_cannot_be_built"]

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / "build" / "bench"

_PRELOADED = ["card_core", *LIBRARIES]
"""Our files, in the order in which they are loaded."""

ARCHITECTURES = "architectures"
"""The file in the folder that says for which cards PyTorch has code: "sm_80 sm_90"."""

_SOURCES = {
    "card_core": ["log", "gpu", "attributes", "usage", "context", "memory"],
    "cudart": ["runtime", "runtime_memory", "kernels", "graphs", "runtime_errors"],
    "cuda": [
        "driver",
        "driver_memory",
        "driver_modules",
        "driver_unsupported",
        "driver_errors",
    ],
    "nvml": ["nvml"],
    "cublaslt": ["cublaslt"],
    "cudnn": ["cudnn"],
    "nccl": ["nccl"],
    "nvrtc": ["nvrtc"],
}
"""What each library is made of besides its stubs."""

_SONAMES = {"cuda": "libcuda.so.1", "nvml": "libnvidia-ml.so.1"}
"""The driver's, which PyTorch loads by name."""

_FLAGS = "-std=gnu17 -O2 -g -fPIC -Wall -Wextra -Wno-deprecated-declarations".split()


def reason_it_cannot_be_built() -> str | None:
    """Return why there is no bench on this machine, or None where it can be built."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        return f"the bench preloads ELF libraries: {sys.platform} has none"
    if installed().cuda is None:
        return f"PyTorch {installed().version} is a CPU build: it has no CUDA code to run"
    missing = [tool for tool in ("gcc", "nm", "readelf") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} not found: install a C compiler with binutils"
    for header in ("cuda.h", "cuda_runtime_api.h", "crt/host_defines.h", "cudnn.h", "cublasLt.h"):
        if not installed().headers(header):
            return f"{header} is neither in PyTorch's wheels nor in /usr/local/cuda/include"
    return None


@cache
def built() -> Path:
    """Return the folder with the libraries; build them where that has not been done.

    Raises:
        RuntimeError: they cannot be built here; the message says why.
    """
    if reason := reason_it_cannot_be_built():
        raise RuntimeError(f"there is no simulated runtime: {reason}")
    folder = CACHE / _key()
    if folder.is_dir():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with _alone(CACHE / "lock"):
        if not folder.is_dir():
            unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=CACHE))
            try:
                _Build(installed(), unfinished).run()
                unfinished.rename(folder)
            except BaseException:
                shutil.rmtree(unfinished, ignore_errors=True)
                raise
    return folder


def preloading(folder: Path) -> dict[str, str]:
    """Return the variables with which a process loads the libraries of a folder."""
    libraries = [str(folder / f"{name}.so") for name in _PRELOADED]
    before = os.environ.get("LD_PRELOAD")
    return {"LD_PRELOAD": ":".join([*libraries, *([before] if before else [])])}


def _key() -> str:
    """Name what the libraries are made from: PyTorch, where it lies, and our sources."""
    digest = hashlib.sha256(str(installed().folder).encode())
    for path in sorted([*HERE.glob("src/**/*"), HERE / "build.py", HERE / "stubs.py"]):
        digest.update(path.read_bytes() if path.is_file() else b"")
    return f"torch-{installed().version}-{digest.hexdigest()[:12]}"


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class _Build:
    """One run of the compiler and the linker, into a folder."""

    def __init__(self, torch: Installed, folder: Path) -> None:
        self.torch = torch
        self.folder = folder
        self.objects = folder / "objects"
        self.objects.mkdir()
        self.needed = torch.needed()
        self.imports = torch.imports()
        self.defined: dict[str, set[str]] = {}

    def run(self) -> None:
        """Compile and link everything."""
        self._write_error_tables()
        own = sorted({*HERE.glob("src/*.c"), *self.objects.glob("*_errors.c")})
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(self._compile, own))
        self._link("card_core", "card_core.so", "", [])
        stubbed = {name: library for name, library in LIBRARIES.items() if self._soname(name)}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda item: self._make(*item), stubbed.items()))
        (self.folder / "driver").mkdir()
        (self.folder / "driver" / "libcuda.so.1").symlink_to("../cuda.so")
        shutil.rmtree(self.objects)
        (self.folder / ARCHITECTURES).write_text(self._architectures())

    def _architectures(self) -> str:
        """Ask PyTorch, over what was built, which cards its binaries have code for."""
        asked = "import torch; print(torch._C._cuda_getArchFlags())"
        return _run(sys.executable, "-c", asked, env={**os.environ, **preloading(self.folder)})

    def _write_error_tables(self) -> None:
        runtime = text_of(self.torch.headers("driver_types.h"))
        driver = text_of(self.torch.headers("cuda.h"))
        tables = {
            "runtime_errors": error_table(runtime, "cudaError", "error_names"),
            "driver_errors": error_table(driver, "cudaError_enum", "driver_error_names"),
        }
        for name, code in tables.items():
            (self.objects / f"{name}.c").write_text(code)

    def _soname(self, name: str) -> str | None:
        """Return the soname that a library plays; None where PyTorch does not know it."""
        stem = LIBRARIES[name].stem
        known = [soname for soname in self.needed if soname.startswith(f"{stem}.so")]
        return _SONAMES.get(name) or (known[0] if known else None)

    def _make(self, name: str, library: Library) -> None:
        """Write a library's stubs, and link it."""
        wanted = {each for each in self.imports if re.match(library.functions, each.name)}
        versions = {each.version for each in wanted if each.version}
        mine = _SOURCES.get(name, [])
        defined = set().union(*(self.defined[source] for source in mine))
        missing = {each.name for each in wanted} - defined
        if name in ("cudart", "cuda"):
            code = refusals(missing)
        else:
            code = stubs(missing, text_of(self.torch.headers(*library.headers)))
        source = self.objects / f"{name}_stubs.c"
        source.write_text(code)
        self._compile(source, "-Wno-unused")
        version = next(iter(versions), "")
        soname = self._soname(name)
        assert soname is not None and len(versions) < 2, (name, versions)
        self._link(name, soname, version, [f"{name}_stubs"])

    def _compile(self, source: Path, *flags: str) -> None:
        # headers of PyTorch's own wheels come first, the machine's last
        folders = [flag for folder in self.torch.header_folders for flag in ("-I", str(folder))]
        target = self.objects / f"{source.stem}.o"
        own = ("-I", HERE / "src", "-idirafter", HERE / "src" / "stand_ins")
        _run("gcc", *_FLAGS, *flags, *own, *folders, "-c", source, "-o", target)
        listing = _run("nm", "--defined-only", target)
        self.defined[source.stem] = {
            line.split()[-1] for line in listing.splitlines() if " T " in line
        }

    def _link(self, name: str, soname: str, version: str, more: list[str]) -> None:
        objects = [self.objects / f"{source}.o" for source in [*_SOURCES.get(name, []), *more]]
        options = [f"-Wl,-soname,{soname}", "-Wl,-rpath,$ORIGIN"]
        if version:
            script = self.objects / f"{name}.map"
            script.write_text(f"{version} {{ global: *; }};\n")
            options.append(f"-Wl,--version-script={script}")
        core = [] if name == "card_core" else [self.folder / "card_core.so"]
        target = self.folder / f"{name}.so"
        _run("gcc", "-shared", *options, "-o", target, *objects, *core, "-lpthread", "-ldl")


def _run(*command: object, env: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    if done.stderr:
        print(done.stderr, file=sys.stderr)
    return done.stdout


if __name__ == "__main__":
    print(built())
