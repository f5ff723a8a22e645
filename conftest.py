"""Doctests are looked for in all modules but those whose library is not installed."""

from importlib.util import find_spec

_NEEDS = {
    "exports/accelerate.py": "accelerate",
    "exports/lightning.py": "lightning",
    "exports/transformers.py": "transformers",
    "integrations/huggingface.py": "transformers",
    "integrations/lightning.py": "lightning",
    "integrations/transformers.py": "transformers",
}

collect_ignore = [
    f"autobatch/{module}" for module, library in _NEEDS.items() if find_spec(library) is None
]
