"""Doctests are looked for in all modules but those whose library is not installed."""

from importlib.util import find_spec

_NEEDS = {"accelerate": "accelerate", "huggingface": "transformers", "lightning": "lightning"}

collect_ignore = [
    f"autobatch/integrations/{module}.py"
    for module, library in _NEEDS.items()
    if find_spec(library) is None
]
