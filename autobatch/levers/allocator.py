"""Settings of the caching allocator, which decide how much is reserved for what is allocated."""

from __future__ import annotations

from dataclasses import replace

from autobatch.levers.lever import Lever, Option
from autobatch.levers.setup import Setup

__all__ = ["ALLOCATOR"]

_CODE = """\
import os
# before torch is imported, or in the shell
os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True\""""


def _options(setup: Setup) -> list[Option]:
    if setup.settings.expandable_segments:
        return []
    return [
        Option(
            lever="allocator",
            value="expandable segments",
            what="Segments of memory grow in place, so that blocks of new sizes fit into what is "
            "reserved.",
            code=_CODE,
            keeps_state=True,
            apply=_with_expandable_segments,
        )
    ]


def _with_expandable_segments(setup: Setup) -> Setup:
    return replace(setup, settings=replace(setup.settings, expandable_segments=True))


ALLOCATOR = Lever(
    name="allocator",
    what="Let the caching allocator reserve memory another way.",
    options=_options,
)
