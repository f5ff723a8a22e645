"""Compiles the simulated allocator, which replays a trace dozens of times for one `tune`.

Where that fails, the same modules run as Python. All the rest is in `pyproject.toml`.
"""

import os
import tempfile
import warnings
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class AllOrNone(build_ext):
    """Compiles modules that need each other: where one fails, the others run as Python, too."""

    def run(self):
        """Compile, and remove what is of no use alone."""
        super().run()
        made = [Path(self.get_ext_fullpath(module.name)) for module in self.extensions]
        if not all(library.exists() for library in made):
            for library in made:
                library.unlink(missing_ok=True)


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
    setup(ext_modules=modules, cmdclass={"build_ext": AllOrNone})
