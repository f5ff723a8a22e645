"""Colours by what they stand for, on a light ground: of drawings, charts and the page's styles.

The hues are Paul Tol's "muted" scheme: distinguishable with any common colour blindness.
"""

from __future__ import annotations

__all__ = [
    "BAND",
    "BUDGET",
    "CATEGORIES",
    "CYAN",
    "FAINT",
    "GREEN",
    "GRID",
    "GROUND",
    "INDIGO",
    "INK",
    "OLIVE",
    "PURPLE",
    "ROSE",
    "SAND",
    "SILVER",
    "SLATE",
    "TEAL",
    "WINE",
]

INK, FAINT, GRID, GROUND = "#1d2430", "#5b6678", "#e7eaef", "#ffffff"
BUDGET, BAND = "#b3261e", "#1d5bbf"

INDIGO, CYAN, TEAL, GREEN, OLIVE = "#332288", "#88ccee", "#44aa99", "#117733", "#999933"
SAND, ROSE, WINE, PURPLE = "#ddcc77", "#cc6677", "#882255", "#aa4499"
SLATE, SILVER = "#5d6673", "#a5abb5"

CATEGORIES = {
    "other processes": "#1b1f26",
    "context": SLATE,
    "parameters": INDIGO,
    "buffers": CYAN,
    "gradients": ROSE,
    "optimizer state": SAND,
    "activations": TEAL,
    "temporaries": PURPLE,
    "inputs": GREEN,
    "workspace": OLIVE,
    "other": WINE,
    "rounding": SILVER,
    "cached": "#d5d9df",
}
"""Colours of the parts of a footprint, in the order in which they are drawn."""
