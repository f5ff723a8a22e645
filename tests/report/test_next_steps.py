"""The page's lines for each trainer have the levers of the plan, or let the trainer set them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from autobatch.plan.plan import Plan
from autobatch.records.applied import AppliedLever
from autobatch.report.page.next_steps import next_steps
from tests.levers.setups import RUNS, options_of, setup_of
from tests.support.plans import example_plan, ragged_plan

WEIGHTS = AppliedLever(
    lever="precision",
    value="bf16 weights",
    code="import torch\nmodel = model.to(torch.bfloat16)\n"
    "from autobatch.levers.precision import in_dtype\nbatch = in_dtype(batch, torch.bfloat16)",
)
BLOCKS = AppliedLever(
    lever="checkpointing",
    value="every block",
    code='model.gradient_checkpointing_enable({"use_reentrant": False})',
    trainer='gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}',
)
FUSED = AppliedLever(
    lever="optimizer",
    value="fused",
    code="import torch\noptimizer = torch.optim.AdamW(model.parameters(), fused=True)",
    trainer='optim="adamw_torch_fused"',
)
FSDP = AppliedLever(
    lever="sharding",
    value="FSDP2",
    code="from torch.distributed.fsdp import fully_shard\nfully_shard(model)",
)
IN_BACKWARD = AppliedLever(
    lever="optimizer", value="in backward", code="optimizers = {}\n# leave step() out"
)


def scripts(*levers: AppliedLever, ranks: int = 1, **changes: Any) -> dict[str, str]:
    windows = ((4, 4),) * ranks
    plan = ragged_plan(8 * ranks, windows, autocast=None, clip_norm=None)
    return {
        step.key: step.code
        for step in next_steps(dataclasses.replace(plan, levers=levers, **changes))
    }


def test_the_code_of_the_levers_is_at_the_head_of_each_script() -> None:
    for key, script in scripts(WEIGHTS, BLOCKS).items():
        compile(script, key, "exec")
        loop = script.index(
            {"transformers": "trainer =", "lightning": "trainer ="}.get(key, "for ")
        )
        if key != "lightning":  # whose own precision it is
            assert script.index("model = model.to(torch.bfloat16)") < loop
            assert "batch = in_dtype(batch, torch.bfloat16)" in script
        if key != "transformers":  # whose own arguments do it
            assert script.index("model.gradient_checkpointing_enable(") < loop


def test_batches_are_changed_where_a_trainer_makes_them() -> None:
    made = scripts(dataclasses.replace(WEIGHTS, value="mine"))
    assert "data_collator=collate" in made["transformers"]
    assert "collate_fn=collate" in made["lightning"]


def test_a_script_says_that_it_does_by_hand_what_no_setting_does_and_only_then() -> None:
    assert {"by_hand=True" in script for script in scripts().values()} == {False}
    made = scripts(BLOCKS)
    assert "to_training_arguments()" in made["transformers"]
    assert "to_lightning(by_hand=True)" in made["lightning"]
    assert "to_accelerate(by_hand=True)" in made["accelerate"]
    ragged = dataclasses.replace(ragged_plan(257, ((86, 86, 85),)), levers=(BLOCKS,))
    texts = {step.key: step.code for step in next_steps(ragged)}
    assert "to_lightning(nearest=True, by_hand=True)" in texts["lightning"]


def test_an_optimizer_that_the_trainer_can_name_is_not_made_again() -> None:
    made = scripts(FUSED)
    assert "fused=True" not in made["transformers"]
    assert "optimizers=(optimizer, None)" not in made["transformers"]
    other = scripts(dataclasses.replace(FUSED, trainer=None))
    assert "optimizers=(optimizer, None)" in other["transformers"]
    assert "# optimizer = torch.optim.AdamW" in other["lightning"]  # in configure_optimizers


def test_trainers_share_a_model_out_by_themselves() -> None:
    made = scripts(FSDP, ranks=2, sharding="fsdp")
    for key in ("windows", "plain", "torchrun"):
        assert "fully_shard(model)" in made[key]
        assert "DistributedDataParallel" not in made[key]
    for key in ("transformers", "lightning", "accelerate"):
        assert "# sharding: FSDP2\n# set this in" in made[key]
        assert "fully_shard(" not in made[key]


def test_optimizers_that_hooks_step_are_offered_no_loop_that_steps() -> None:
    assert list(scripts(IN_BACKWARD)) == ["plain"]


def test_plain_says_whether_it_needs_autobatch() -> None:
    def about(*levers: AppliedLever) -> str:
        plan = dataclasses.replace(example_plan(), levers=levers)
        return next(step.about for step in next_steps(plan) if step.key == "plain")

    assert about(BLOCKS).startswith("Without autobatch in the training. ")
    assert about(WEIGHTS).startswith("Without autobatch in the training, but for ")


@pytest.mark.parametrize("name", list(RUNS))
@pytest.mark.parametrize("ranks", [1, 2])
def test_scripts_of_every_lever_are_valid_python(name: str, ranks: int) -> None:
    setup = setup_of(RUNS[name]()).having(world_size=ranks)
    for label, option in options_of(setup).items():
        levers = option.applied_to(setup).workload.levers
        for plan in plans(ranks):
            for step in next_steps(dataclasses.replace(plan, levers=levers)):
                compile(step.code, f"{label} {step.key}", "exec")


def plans(ranks: int) -> list[Plan]:
    uniform = ragged_plan(4 * ranks, ((2, 2),) * ranks)
    odd = ragged_plan(3 * ranks, ((2, 1),) * ranks, autocast="fp16")
    sharing: Any = "ddp" if ranks > 1 else None
    return [dataclasses.replace(plan, sharding=sharing) for plan in (uniform, odd)]
