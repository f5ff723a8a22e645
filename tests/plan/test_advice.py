from __future__ import annotations

from autobatch.plan.advice import Advice, Choice

AS_IT_IS = Choice(
    options=(),
    what=(),
    code=(),
    trainer=(),
    changes_numerics=False,
    fits=True,
    reference_bytes=2**20,
    saved_bytes=0,
    ceiling=64,
    micro_batch=32,
    accumulation_steps=2,
    likelihood=0.95,
    window_seconds=0.1,
)


def test_the_repr_is_one_line_with_the_verdict() -> None:
    advice = Advice(
        model="Net",
        target=64,
        gpu="t4",
        budget_bytes=2**30,
        reference=32,
        as_it_is=AS_IT_IS,
        choices=(),
        needs=(),
        notes=("a note",) * 100,
        seconds=1.0,
    )
    assert repr(advice) == (
        "<Advice for Net on t4: fits as it is: micro-batch 32 x 2; 0 choices, simulated>"
    )
