"""What a report says about a plan: its summary on one screen, and the whole report.

Invariant: what is said is decided here and in `advice`, and the renderers only lay it out. Every
text is printable and on one line, whatever the plan's strings hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from autobatch.advice.accumulation import (
    accumulation_rows,
    accumulation_summary,
    equivalence_conditions,
    other_evidence,
    other_window,
)
from autobatch.advice.loop import training_loop
from autobatch.advice.normalization import batchnorm, batchnorm_rows
from autobatch.advice.rates import learning_rate, learning_rate_factors, warm_up
from autobatch.advice.wording import effective_batch, window_text
from autobatch.records.evidence import Trial
from autobatch.records.plan_record import PlanRecord
from autobatch.report.document import (
    Bullets,
    Chart,
    Code,
    Document,
    Facts,
    Paragraph,
    Section,
    Table,
    printable,
    told_sections,
)
from autobatch.report.footprint_summary import account, basis_of, device_range, share
from autobatch.report.holders import holder_sections
from autobatch.report.savings import large_savings, savings_section
from autobatch.support.units import format_bytes, format_seconds
from autobatch.support.wording import count

__all__ = [
    "evidence_section",
    "full_report",
    "plan_facts",
    "speed_sections",
    "summary",
    "training_sections",
    "why_this_size",
]


def summary(plan: PlanRecord) -> Document:
    """Return the plan on one screen: the answer, the account, the evidence, what to know."""
    return Document(
        title=effective_batch(plan),
        subtitle=f"{printable(plan.model.name)} on {printable(plan.gpu.name)}",
        sections=(
            Section("", (plan_facts(plan),)),
            account(plan.footprint, plan.most_bytes),
            Section(f"Evidence: {_evidence(plan)}", (_trials(plan.trials),) if plan.trials else ()),
            *_told(plan),
            *large_savings(plan),
        ),
    )


def full_report(plan: PlanRecord) -> Document:
    """Return the whole report: the summary, the charts and what the plan means for training."""
    head = summary(plan)
    facts, memory, *_ = head.sections
    holders = holder_sections(plan)
    return Document(
        title=head.title,
        subtitle=head.subtitle,
        sections=(
            facts,
            *_told(plan),
            Section(
                "Why this micro-batch",
                (
                    Paragraph(why_this_size(plan)),
                    Chart("memory", "Peak reserved memory against the micro-batch."),
                ),
            ),
            Section(
                "What the memory is used for",
                (
                    Chart("breakdown", "Bytes by category at the peak, against the budget."),
                    *memory.blocks,
                    Chart("timeline", "Live bytes over the traced training windows."),
                ),
            ),
            *holders[:1],
            *savings_section(plan),
            *holders[1:],
            *training_sections(plan),
            Section(
                "The training loop",
                (
                    Paragraph(
                        "Plain PyTorch with this plan's sizes. It expects your `model`, "
                        "`optimizer`, `dataset`, `epochs` and, unless the model gives its loss, a "
                        "`loss_fn(model, batch)` that is a mean over samples. An incomplete last "
                        "window of an epoch is left out; "
                        "`for window in plan.windows(loader, optimizer)` keeps it, and takes any "
                        "loader."
                    ),
                    Code(training_loop(plan)),
                ),
            ),
            evidence_section(plan),
        ),
    )


def training_sections(plan: PlanRecord) -> tuple[Section, ...]:
    """Return what the plan means for training: accumulation, BatchNorm, the learning rate."""
    return (
        Section(
            "With and without accumulation",
            (
                Paragraph(accumulation_summary(plan)),
                *_accumulation_table(plan),
                Paragraph(
                    "The accumulated gradient equals that of the whole batch under these "
                    "conditions; `autobatch check SPEC --plan plan.json` compares the two for "
                    "your model, and names what breaks which:"
                ),
                Bullets(equivalence_conditions(plan)),
            ),
        ),
        Section("The effective batch", (_effective_batch_facts(plan),)),
        Section("BatchNorm", (Paragraph(batchnorm(plan)), *_batchnorm_table(plan))),
        Section(
            "Learning rate",
            (
                Paragraph(learning_rate(plan)),
                *_factors(plan),
                Paragraph(warm_up(plan)),
            ),
        ),
    )


def evidence_section(plan: PlanRecord) -> Section:
    """Return what ran, and where the plan comes from."""
    return Section(
        f"Evidence: {_evidence(plan)}",
        (*((_trials(plan.trials),) if plan.trials else ()), _provenance(plan)),
    )


def plan_facts(plan: PlanRecord) -> Facts:
    """Return the workload, the ceiling, the budget, the peak, and how sure they are."""
    model, footprint = plan.model, plan.footprint
    trained = (
        ""
        if model.trainable_parameters == model.parameters
        else f" ({model.trainable_parameters:,} trained)"
    )
    settings = [
        f"{count(model.parameters, 'parameter')}{trained}",
        printable(model.optimizer),
        f"{model.autocast} autocast" if model.autocast else "no autocast",
        *([f"gradients clipped to {model.clip_norm:g}"] if model.clip_norm is not None else []),
        f"loss: {'yours' if model.loss == 'user' else printable(model.loss)}",
    ]
    return Facts(
        (
            ("workload", ", ".join(settings)),
            *([("levers", _levers(plan))] if plan.levers else []),
            *([("ranks", _ranks(plan))] if plan.sharding else []),
            ("ceiling", _ceiling(plan)),
            ("slack", _slack(plan)),
            ("budget", _budget(plan)),
            (
                "peak",
                f"{format_bytes(footprint.peak_reserved_bytes)} reserved, "
                f"{share(footprint.peak_reserved_bytes, plan.budget_bytes)} of the budget; "
                f"{format_bytes(footprint.peak_device_bytes)} on the device with the context",
            ),
            *_certainty(plan),
        )
    )


def _certainty(plan: PlanRecord) -> list[tuple[str, str]]:
    """Say how sure a simulated plan is; nothing where a GPU was measured."""
    if plan.likelihood is None or plan.ceiling_likelihood is None:
        return []
    return [
        (
            "certainty",
            f"{device_range(plan.footprint)}; the plan is {plan.likelihood:.0%} likely to fit a "
            f"real card, the ceiling {plan.ceiling_likelihood:.0%} "
            f"({basis_of(plan.footprint)})",
        )
    ]


def _levers(plan: PlanRecord) -> str:
    """Name what training needs to be changed by, for the plan to hold."""
    labels = "; ".join(printable(lever.label) for lever in plan.levers)
    return f"{labels}; the plan holds only with them, and the training loop begins with their code"


def _ranks(plan: PlanRecord) -> str:
    shared = {
        "ddp": "DistributedDataParallel: a whole copy on each, and buckets to average gradients in",
        "fsdp": "FSDP2: each keeps its share of parameters, gradients and optimizer state",
        "custom": "FSDP2 by a function of yours",
    }
    return f"{count(plan.world_size, 'GPU')}, {shared[plan.sharding or 'ddp']}; figures of rank 0"


def _ceiling(plan: PlanRecord) -> str:
    evidence = plan.ceiling_footprint.evidence
    if plan.ceiling is None:
        return (
            f"at least micro-batch {plan.ceiling_at_least:,} ({evidence}): "
            "the search stopped at its upper limit"
        )
    proof = f"; {plan.ceiling + 1:,} was run and does not" if plan.proven else ""
    return f"micro-batch {plan.ceiling:,} is the largest that fits ({evidence}{proof})"


def _slack(plan: PlanRecord) -> str:
    spare = plan.ceiling_at_least - plan.micro_batch
    if spare == 0:
        return f"none in samples; {format_bytes(plan.slack_bytes)} of the budget stay free"
    return (
        f"{count(spare, 'sample')} below the ceiling; "
        f"{format_bytes(plan.slack_bytes)} of the budget stay free"
    )


def _budget(plan: PlanRecord) -> str:
    others = f" - {format_bytes(plan.others_bytes)} others" if plan.others_bytes else ""
    usable = (
        f"({format_bytes(plan.gpu.capacity_bytes)} capacity - "
        f"{format_bytes(plan.gpu.context_bytes)} context{others})"
    )
    left = plan.gpu.capacity_bytes - plan.gpu.context_bytes - plan.others_bytes
    if plan.allowed_bytes is not None and plan.allowed_bytes < left:
        usable = f"{format_bytes(plan.allowed_bytes)} allowed to the process"
    return f"{usable} × (1 - {plan.headroom:g} headroom) = {format_bytes(plan.budget_bytes)}"


def why_this_size(plan: PlanRecord) -> str:
    """Say why the plan takes this micro-batch."""
    if plan.micro_batch == plan.ceiling_at_least:
        return f"{_sentence(_ceiling(plan))} The plan uses it."
    if plan.objective != "largest":
        how = "timed" if plan.speed and plan.speed[0].how == "measured" else "estimated"
        asked = {
            "fastest": f"whose update is {how} to take least of the splits that were looked at",
            "balanced": f"the smallest whose update is {how} to take at most 3 % longer than the "
            "fastest",
        }
        return (
            f"{_sentence(_ceiling(plan))} The plan takes {plan.micro_batch:,}, "
            f"{asked[plan.objective]}; {_slack(plan)}."
        )
    return (
        f"{_sentence(_ceiling(plan))} The plan takes {plan.micro_batch:,}, because it divides the "
        f"target of {plan.target:,} over the fewest equal steps; {_slack(plan)}."
        if plan.split.uniform
        else f"{_sentence(_ceiling(plan))} No equal size divides the target of {plan.target:,} in "
        f"few steps, so sizes differ by one and the sum is exact; {_slack(plan)}."
    )


def speed_sections(plan: PlanRecord) -> Iterator[Section]:
    """Yield what splits of the target take, where time was asked for."""
    if not plan.speed:
        return
    fastest = min(point.window_seconds for point in plan.speed)
    rows = tuple(
        (
            f"{point.micro_batch:,} × {point.accumulation_steps:,}"
            + (" (planned)" if point.micro_batch == plan.micro_batch else ""),
            format_seconds(point.window_seconds),
            f"{format_seconds(point.low)} to {format_seconds(point.high)}",
            f"{plan.target / point.window_seconds:,.0f}",
            f"{point.window_seconds / fastest:.2f}x",
        )
        for point in plan.speed
    )
    columns = ("micro-batch × steps", "window", "range", "samples/s", "of the fastest")
    how = plan.speed[0].how
    text = (
        "Medians of windows that ran on the GPU after a warm-up."
        if how == "measured"
        else "Estimates by a roofline over every operator: they tell which is faster, not how fast."
    )
    if plan.loader_samples_per_s is not None:
        text += f" The loader gave {plan.loader_samples_per_s:,.0f} samples/s here."
    yield Section(f"Speed ({how})", (Paragraph(text), Table(columns, "lrrrr", rows)))


def _evidence(plan: PlanRecord) -> str:
    return (
        f"{count(plan.executions, 'execution')}, {count(plan.ooms, 'OOM')}, "
        f"{printable(plan.method)}, {plan.seconds:.1f} s"
    )


def _trials(trials: Sequence[Trial]) -> Table:
    timed = any(trial.window_seconds is not None for trial in trials)
    return Table(
        columns=(
            *("micro-batch", "steps", "result", "allocated", "reserved", "seconds"),
            *(("samples/s",) if timed else ()),
            "how known",
        ),
        align="rrlrrr" + "r" * timed + "l",
        rows=tuple(
            (
                f"{trial.micro_batch:,}",
                f"{trial.accumulation_steps:,}",
                _result(trial),
                format_bytes(trial.peak_allocated_bytes),
                format_bytes(trial.peak_reserved_bytes),
                f"{trial.seconds:.2f}",
                *((_throughput(trial),) if timed else ()),
                trial.evidence,
            )
            for trial in trials
        ),
    )


def _throughput(trial: Trial) -> str:
    if trial.window_seconds is None:
        return "-"
    return f"{trial.micro_batch * trial.accumulation_steps / trial.window_seconds:,.1f}"


def _result(trial: Trial) -> str:
    if trial.oom:
        return "out of memory"
    if trial.alloc_retries:
        return count(trial.alloc_retries, "allocation retry", "allocation retries")
    return "fits" if trial.fits else "over the budget"


def _told(plan: PlanRecord) -> tuple[Section, ...]:
    """Return speed, where it was asked for, what must be acted on, and what was assumed."""
    return (*speed_sections(plan), *told_sections(plan.warnings, plan.notes))


def _accumulation_table(plan: PlanRecord) -> tuple[Table, ...]:
    other = other_window(plan)
    if other is None:
        return ()
    rows = accumulation_rows(plan)
    planned = window_text(max(plan.split.windows, key=sum))
    steps, micro_batch = other
    return (
        Table(
            columns=(
                "per GPU",
                f"{planned if plan.accumulation_steps > 1 else f'1 × {planned}'} (planned)",
                f"{steps} × {micro_batch:,} ({other_evidence(plan)})",
                "note",
            ),
            align="lrrl",
            rows=tuple(
                (
                    row.part,
                    format_bytes(row.planned_bytes),
                    "unknown" if row.other_bytes is None else format_bytes(row.other_bytes),
                    row.note,
                )
                for row in rows
            ),
            totals=frozenset({len(rows) - 1}),
        ),
    )


def _batchnorm_table(plan: PlanRecord) -> tuple[Table, ...]:
    rows = batchnorm_rows(plan)
    if not rows:
        return ()
    return (
        Table(
            columns=("per GPU", "all samples at once", "planned"),
            align="lrr",
            rows=tuple(
                (row.what, f"{row.before:,}", " or ".join(f"{size:,}" for size in row.after))
                for row in rows
            ),
        ),
    )


def _effective_batch_facts(plan: PlanRecord) -> Facts:
    ranks = [
        (f"rank {rank}", _window(window)) for rank, window in enumerate(plan.split.windows[:8])
    ]
    if plan.world_size > len(ranks):
        ranks.append(("…", f"{count(plan.world_size - len(ranks), 'more rank')} in plan.json"))
    return Facts((("effective batch", effective_batch(plan)), *ranks))


def _window(window: Sequence[int]) -> str:
    total = count(sum(window), "sample")
    return total if len(window) == 1 else f"{window_text(window)} = {total}"


def _factors(plan: PlanRecord) -> tuple[Table, ...]:
    factors = learning_rate_factors(plan)
    if len(factors) < 2:
        return ()
    return (
        Table(
            columns=("tuned for", f"multiply by, for {plan.effective_batch:,}"),
            align="rr",
            rows=tuple((f"{size:,}", f"{factor:.3g}") for size, factor in factors),
        ),
    )


def _provenance(plan: PlanRecord) -> Facts:
    versions = ", ".join(f"{name} {version}" for name, version in plan.versions.items())
    sources = tuple(
        (f"GPU: {printable(name)}", printable(source)) for name, source in plan.gpu.sources.items()
    )
    command = (("command", f"`{_inline(plan.command)}`"),) if plan.command else ()
    created = (("created", printable(plan.created)), ("versions", printable(versions)))
    return Facts((*command, *created, *sources))


def _inline(code: str) -> str:
    """Make a string one that stands between backticks."""
    return printable(code).replace("`", "'")


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
