"""Summaries as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from autobatch.support.units import MIB
from reports.common.markdown import table

Facts = Mapping[str, Any]

TARGETS: Mapping[str, Mapping[str, tuple[str, float]]] = {
    "timm-peaks": {
        "median": ("at most", 0.015),
        "p90": ("at most", 0.06),
        "within_5_percent": ("at least", 0.88),
    },
    "max-batch": {"inside": ("at least", 0.75)},
    "xmem": {"median": ("at most", 0.035)},
}

_CLOSE = 0.05
_NAMED = 6

_FIGURES = {
    "median": "median error",
    "mean": "mean error",
    "p90": "90th percentile",
    "signed_median": "median, signed",
    "under_predicted": "under-predicted",
    "within_5_percent": "within 5 %",
    "inside": "inside the bracket",
    "below": "ceiling below it",
    "above": "ceiling above it",
}


def percent(share: float | None, digits: int = 1, *, sign: bool = False) -> str:
    """Render a share."""
    if share is None:
        return ""
    return f"{100 * share:{'+' if sign else ''}.{digits}f} %"


def summary_table(facts: Facts) -> str:
    """Render the figures of one table beside their targets."""
    lines = ["| figure | value | target |", "|-|-|-|"]
    lines.append(f"| rows | {facts['table_rows']} | |")
    lines.append(f"| rows with a prediction | {facts['rows']} | |")
    targets = TARGETS.get(facts["kind"], {})
    for name, label in _FIGURES.items():
        if name in facts:
            value = percent(facts[name], 2 if "median" in name else 1, sign="signed" in name)
            lines.append(f"| {label} | {value} | {_target(targets.get(name))} |")
    if "ran_out" in facts:
        told = f"{facts['ran_out_foretold']} of {facts['ran_out']}"
        lines.append(f"| runs out of memory, foretold | {told} | |")
    crashes = sum(len(models) for models in facts["causes"].values())
    lines.append(f"| rows without a prediction | {crashes} | |")
    text = "\n".join(lines)
    for cause, models in facts["causes"].items():
        text += f"\n\nNo prediction: {', '.join(dict.fromkeys(models))}: {cause}."
    return text


def _target(target: tuple[str, float] | None) -> str:
    return "" if target is None else f"{target[0]} {percent(target[1])}"


def context_note(facts: Facts) -> str:
    """Say which context was added, and what the best single one would have given."""
    given = facts["settings"]["context_bytes"]
    words = "the card's in the catalogue" if given is None else f"{given / MIB:,.0f} MiB"
    note = f"Context: {words}."
    best = facts.get("best_context")
    if best:
        note += (
            f" Fitted to the table, one constant of {best['mib']:,} MiB would give a median of "
            f"{percent(best['median'], 2)}, a 90th percentile of {percent(best['p90'])} and "
            f"{percent(best['within_5_percent'])} within 5 %."
        )
    return note


def needed_table(facts: Facts) -> str:
    """Render how much more than predicted the large runs took, by percentile."""
    needed: Mapping[str, float] = facts["needed"]
    if not needed:
        return ""
    heads = (f"percentile of the {facts['large_rows']} large rows", *needed)
    values = (percent(share, sign=True) for share in needed.values())
    return table(heads, [("reserved beyond the prediction", *values)]) + "\n\n"


def family_table(families: Mapping[str, Facts]) -> str:
    """Render the error budget by family."""
    heads = (
        "family",
        "models",
        "rows",
        "off by more than 5 %",
        "median, signed",
        "lowest",
        "highest",
        "missing, constant (MiB)",
        "missing, per sample",
    )
    rows = (
        (
            name,
            str(facts["models"]),
            str(facts["rows"]),
            str(_far_off(facts)),
            percent(facts["signed_median"], sign=True),
            percent(facts["lowest"], sign=True),
            percent(facts["highest"], sign=True),
            _or_nothing(facts["missing_constant_mib"], lambda mib: f"{mib:+.0f}"),
            percent(facts["missing_per_sample"], sign=True),
        )
        for name, facts in families.items()
    )
    return table(heads, rows)


def budget(families: Mapping[str, Facts]) -> str:
    """Say where the errors are, in words: which families, in which direction, and how they grow."""
    far = {name: _far_off(facts) for name, facts in families.items()}
    total, rows = sum(far.values()), sum(facts["rows"] for facts in families.values())
    if not total:
        return f"Not one of {rows} rows is off by more than 5 %."
    largest = sorted((name for name in far if far[name]), key=lambda name: -far[name])[:_NAMED]
    shares = ", ".join(f"{name} {far[name]}" for name in largest)
    is_all = sum(far[name] for name in largest) == total
    words = [
        f"{total} of {rows} rows are off by more than 5 %: "
        f"{shares}{'' if is_all else ', and fewer in other families'}."
    ]
    for direction, sign in (("Over", 1), ("Under", -1)):
        off = {n: f for n, f in families.items() if sign * f["signed_median"] > _CLOSE}
        if off:
            words.append(
                f"{direction} by more than 5 % in the median: {', '.join(off)}.{_growth(off)}"
            )
    return "\n\n".join(words)


def _far_off(facts: Facts) -> int:
    count: int = round(facts["rows"] * (1 - facts["within_5_percent"]))
    return count


def _growth(families: Mapping[str, Facts]) -> str:
    """Say how the misses of some families split into a part per sample and a constant."""
    known = [facts for facts in families.values() if facts["missing_per_sample"] is not None]
    if not known:
        return ""
    slopes = sorted(facts["missing_per_sample"] for facts in known)
    constants = sorted(facts["missing_constant_mib"] for facts in known)
    return (
        f" What is missing is, per sample, {percent(slopes[0], sign=True)} to "
        f"{percent(slopes[-1], sign=True)} of the predicted bytes per sample, and a constant of "
        f"{constants[0]:+.0f} to {constants[-1]:+.0f} MiB."
    )


def verdict_table(families: Mapping[str, Facts]) -> str:
    """Render the families that have a ceiling outside of its bracket."""
    rows = (
        (name, *(str(facts[verdict]) for verdict in ("inside", "below", "above")))
        for name, facts in families.items()
        if facts["below"] or facts["above"]
    )
    return table(("family", "inside", "below", "above"), rows)


def _or_nothing(value: float | None, render: Callable[[float], str]) -> str:
    return "" if value is None else render(value)
