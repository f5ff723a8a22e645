"""The simulated allocator as Python, where the package has it compiled."""

from __future__ import annotations

import functools
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

from autobatch import memory

__all__ = ["of_source"]


@functools.cache
def of_source() -> ModuleType:
    """Return the allocator's module, and all that it stands on, run from its source."""
    folder = Path(memory.__path__[0])
    with patch.dict(sys.modules):
        for name in ("segments", "expandable", "allocator"):
            spec = spec_from_file_location(f"autobatch.memory.{name}", folder / f"{name}.py")
            assert spec is not None and spec.loader is not None
            module = sys.modules[spec.name] = module_from_spec(spec)
            spec.loader.exec_module(module)
    return module
