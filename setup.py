"""Compiles the simulated allocator, whose replays are a fifth of the time of a `tune` in Python.

Where there is no compiler, the same modules run as Python. All the rest is in `pyproject.toml`.
"""

import os
import tempfile
import warnings

from Cython.Build import cythonize
from setuptools import Extension, setup

warnings.filterwarnings("ignore", "Editable installation")  # that it is one is no news
os.makedirs("build", exist_ok=True)
# a folder of its own, because environments are installed side by side
with tempfile.TemporaryDirectory(dir="build") as folder:
    modules = cythonize(
        [
            # its types are in the file NAME.pxd beside it
            Extension(
                f"autobatch.memory.{name}",
                [f"autobatch/memory/{name}.py"],
                extra_compile_args=["-O2", "-g0"],
            )
            for name in ("segments", "expandable", "allocator")
        ],
        build_dir=os.path.relpath(folder),
        compiler_directives={"language_level": 3, "annotation_typing": False},
        quiet=True,
    )
    for module in modules:
        module.optional = True  # which Cython does not keep
    setup(ext_modules=modules)
