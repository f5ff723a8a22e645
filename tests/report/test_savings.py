"""What may go of a peak is told in every report, and on one screen only where it is much."""

import dataclasses

from autobatch.records.holders import Holder, PeakBlocks
from autobatch.report import markdown, text
from autobatch.report.content import full_report, summary
from autobatch.report.html import plan_page
from tests.support.plans import MIB, example_plan


def block(op, shape, size_bytes, *, dtype="float32", phase="forward", module="lm_head"):
    category = "activations" if phase == "forward" else "temporaries"
    holder = Holder(
        module=module,
        op=op,
        category=category,
        phase=phase,
        shape=shape,
        dtype=dtype,
        where="",
    )
    return PeakBlocks(holder=holder, count=1, size_bytes=size_bytes)


def plan_with(scores_mib, copies_mib):
    """Return a plan in bf16 whose logits are held twice, and with copies in float32."""
    shape = (65536, 50257)
    return dataclasses.replace(
        example_plan(),
        peak_blocks=(
            block("mm", shape, scores_mib * MIB, dtype="bfloat16"),
            block("_log_softmax", shape, scores_mib * MIB),
            block("_to_copy", (64, 1024, 3072), copies_mib * MIB, module="h.0.mlp.act"),
        ),
    )


def test_one_screen_has_a_line_for_each_large_part_that_may_go():
    plan = plan_with(scores_mib=4096, copies_mib=1000)
    peak = plan.footprint.peak_allocated_bytes
    assert 1000 * MIB / 2 < 0.05 * peak < 4096 * MIB

    (section,) = (part for part in summary(plan).sections if part.title == "What could go")
    ((size, line),) = section.blocks[0].pairs

    assert size == f"4.00 GiB ({4096 * MIB / peak:.1%})"
    assert line == "scores of 50,257 classes are held 2 times: try a loss in chunks"
    assert "\n\nWhat could go\n" in text.render(summary(plan))


def test_reports_have_all_that_may_go_after_the_largest_blocks():
    plan = plan_with(scores_mib=4096, copies_mib=1000)

    titles = [section.title for section in full_report(plan).sections]
    assert titles.count("What could go") == 1
    assert titles[titles.index("What could go") - 1] == "Largest blocks at the peak"
    rendered = markdown.render(full_report(plan))
    for written in (rendered, plan_page(plan)):
        assert "scores of 50,257 classes are held 2 times at the peak" in written
        assert "copies in float32 hold 1000 MiB at the peak" in written
        assert "4.00 GiB (" in written
    assert '<section id="savings">' in plan_page(plan)
    assert '<a href="#savings">What could go</a>' in plan_page(plan)


def test_gradients_of_scores_are_said_to_be_counted():
    plan = plan_with(scores_mib=4096, copies_mib=0)
    assert "gradients counted" not in plan_page(plan)
    gradient = block("nll_loss_backward", (65536, 50257), 4096 * MIB, phase="backward", module="")
    more = dataclasses.replace(plan, peak_blocks=(*plan.peak_blocks, gradient))
    assert "are held 3 times at the peak, gradients counted, 12.0 GiB together" in plan_page(more)


def test_the_number_of_classes_is_left_out_where_their_dimension_is_not_shown():
    shape = (64, 500, 1024)  # of tokens by classes, or of classes by positions
    blocks = (block("_log_softmax", shape, 4096 * MIB), block("clone", shape, 4096 * MIB))
    plan = dataclasses.replace(example_plan(), peak_blocks=blocks)
    assert "scores of classes are held 2 times" in plan_page(plan)


def test_little_that_may_go_takes_no_line_of_the_screen():
    plan = plan_with(scores_mib=700, copies_mib=0)
    assert "What could go" not in text.render(summary(plan))
    assert "What could go" in text.render(full_report(plan))


def test_nothing_is_said_where_nothing_was_found():
    plan = example_plan()
    assert "What could go" not in text.render(full_report(plan))
    assert "What could go" not in plan_page(plan)
