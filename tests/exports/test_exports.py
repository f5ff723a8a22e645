from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from autobatch.errors import FileError, UsageError
from autobatch.exports.one_size import checked, one_size
from autobatch.plan.plan import Plan
from autobatch.records.applied import AppliedLever
from autobatch.records.split import Split, split
from tests.support import ROOT
from tests.support.plans import example_plan, ragged_plan

RAGGED = ragged_plan(257, ((86, 86, 85),))
BLOCKS = AppliedLever(
    lever="checkpointing",
    value="every block",
    code='model.gradient_checkpointing_enable({"use_reentrant": False})',
    trainer='gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}',
)
WEIGHTS = AppliedLever(
    lever="precision", value="bf16 weights", code="model = model.to(torch.bfloat16)"
)
AUTOCAST = AppliedLever(
    lever="precision", value="bf16 autocast", code="with torch.autocast():", trainer="bf16=True"
)
LORA = AppliedLever(lever="lora", value="rank 8, attention", code="model = adapted(model)")
EXPORTS = ("to_training_arguments", "to_lightning", "to_accelerate", "to_deepspeed")


def test_a_uniform_plan_is_taken_as_it_is() -> None:
    plan = example_plan()
    assert one_size(plan, "a trainer") is one_size(plan, "a trainer", nearest=True) is plan.split


def test_the_error_for_a_ragged_plan_names_both_neighbours_and_what_to_do() -> None:
    with pytest.raises(UsageError) as raised:
        one_size(RAGGED, "a trainer")
    message = str(raised.value)
    assert "\n" not in message
    for part in ("a trainer", "257", "86 and 85", "64 × 4 = 256", "86 × 3 = 258", "nearest=True"):
        assert part in message


@given(st.integers(1, 3000), st.integers(1, 300), st.integers(1, 8))
def test_nearest_gives_a_uniform_split_that_fits_and_is_no_farther_than_the_other(
    target: int, ceiling: int, ranks: int
) -> None:
    assume(target >= ranks and (ceiling > 1 or target % ranks == 0))
    asked = split(target, ceiling=ceiling, world_size=ranks)
    plan = replace(example_plan(), split=asked, ceiling=ceiling, ceiling_at_least=ceiling)
    taken = one_size(plan, "a trainer", nearest=True)
    assert taken.uniform and taken.micro_batch <= ceiling and taken.world_size == ranks
    if asked.uniform:
        assert taken.target == target
    # a multiple of the ranks with few enough steps lies on both sides
    assert abs(taken.target - target) <= max(ranks * ceiling, ranks)


def test_arguments_that_the_installed_package_lacks_are_named() -> None:
    def takes(known: int) -> None: ...

    assert checked({"known": 1}, takes=takes, package="pytest") == {"known": 1}
    with pytest.raises(UsageError, match=r"pytest \S+ has no renamed in takes: upgrade"):
        checked({"known": 1, "renamed": 2}, takes=takes, package="pytest")


def test_the_environment_says_the_answer_in_strings() -> None:
    assert example_plan().to_env() == {
        "AUTOBATCH_MICRO_BATCH": "64",
        "AUTOBATCH_ACCUMULATION_STEPS": "4",
        "AUTOBATCH_WORLD_SIZE": "1",
        "AUTOBATCH_EFFECTIVE_BATCH": "256",
        "AUTOBATCH_AUTOCAST": "bf16",
        "AUTOBATCH_CLIP_NORM": "1.0",
    }
    plain = ragged_plan(256, ((64,) * 4,), autocast=None, clip_norm=None).to_env()
    assert {"AUTOBATCH_AUTOCAST", "AUTOBATCH_CLIP_NORM"}.isdisjoint(plain)


def test_a_ragged_plan_reaches_no_environment_unasked() -> None:
    with pytest.raises(UsageError, match="one size"):
        RAGGED.to_env()
    assert RAGGED.to_env(nearest=True)["AUTOBATCH_EFFECTIVE_BATCH"] == "256"


def test_yaml_reads_back_as_the_answer_and_has_the_windows_of_a_ragged_plan() -> None:
    yaml = pytest.importorskip("yaml")
    plan = replace(example_plan(), sharding="ddp")
    assert yaml.safe_load(plan.to_yaml()) == {
        "micro_batch": 64,
        "accumulation_steps": 4,
        "world_size": 1,
        "effective_batch": 256,
        "ceiling": plan.ceiling,
        "autocast": "bf16",
        "clip_norm": 1.0,
        "sharding": "ddp",
        "gpu": "a100-40gb",
    }
    ragged = yaml.safe_load(RAGGED.to_yaml())
    assert ragged["windows"] == [[86, 86, 85]] and ragged["effective_batch"] == 257


def test_deepspeed_gets_numbers_that_multiply_and_the_stage_of_the_sharding() -> None:
    ranks = Split(target=256, windows=((16,) * 4,) * 4)
    for sharding, stage in ((None, 0), ("ddp", 0), ("fsdp", 3)):
        plan = replace(example_plan(), split=ranks, sharding=sharding)
        made = plan.to_deepspeed()
        product = made["train_micro_batch_size_per_gpu"] * made["gradient_accumulation_steps"]
        assert product * 4 == made["train_batch_size"] == 256
        assert made["zero_optimization"] == {"stage": stage}
        assert (made["gradient_clipping"], made["bf16"], made["fp16"]) == (
            1.0,
            {"enabled": True},
            {"enabled": False},
        )
        assert json.loads(json.dumps(made)) == made


def test_deepspeed_asks_for_the_stage_of_a_sharding_function() -> None:
    plan = replace(example_plan(), sharding="custom")
    with pytest.raises(UsageError, match="zero_stage=3"):
        plan.to_deepspeed()
    assert plan.to_deepspeed(zero_stage=2)["zero_optimization"] == {"stage": 2}
    with pytest.raises(UsageError, match="stages 0, 1, 2 and 3"):
        plan.to_deepspeed(zero_stage=4)


def test_deepspeed_itself_accepts_the_configuration() -> None:
    config = pytest.importorskip(
        "deepspeed.runtime.config", reason="DeepSpeed is not installed: pip install deepspeed"
    )
    read = config.DeepSpeedConfig(example_plan().to_deepspeed())
    assert (read.train_batch_size, read.train_micro_batch_size_per_gpu) == (256, 64)
    assert (read.gradient_accumulation_steps, read.gradient_clipping) == (4, 1.0)
    assert read.bfloat16_config.enabled and not read.float16_config.enabled
    assert read.zero_optimization_stage == 0


def test_a_plan_reads_back_from_its_json_text() -> None:
    plan = example_plan()
    assert Plan.from_json(plan.to_json()) == plan
    with pytest.raises(FileError, match="not a plan"):
        Plan.from_json("{}")


def test_a_library_that_is_missing_is_named_with_its_extra() -> None:
    for method, library in (
        ("to_training_arguments", "transformers"),
        ("to_accelerate", "accelerate"),
        ("to_lightning", "lightning"),
    ):
        code = (
            f"import sys; sys.modules['{library}'] = None\n"
            "from tests.support.plans import example_plan\n"
            f"try: example_plan().{method}()\n"
            "except ValueError as error: print(error)"
        )
        said = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
        )
        assert 'pip install "autobatch-gpu[' in said.stdout, said.stderr


def test_importing_autobatch_and_plain_answers_loads_no_trainer() -> None:
    code = (
        "import sys; from tests.support.plans import example_plan\n"
        "plan = example_plan(); plan.to_env(); plan.to_yaml(); plan.to_deepspeed()\n"
        "heavy = {'torch', 'transformers', 'accelerate', 'lightning', 'deepspeed'}\n"
        "assert heavy.isdisjoint(sys.modules), heavy & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("method", EXPORTS)
def test_a_lever_that_no_setting_does_is_refused_by_name_until_it_is_done_by_hand(
    method: str,
) -> None:
    pytest.importorskip({"to_lightning": "lightning"}.get(method, "transformers"))
    plan = replace(example_plan(), levers=(LORA,))
    with pytest.raises(UsageError, match=r"made with lora: rank 8, attention, .*by_hand=True"):
        getattr(plan, method)()
    assert getattr(plan, method)(by_hand=True) == getattr(example_plan(), method)()


@pytest.mark.parametrize("method", EXPORTS)
def test_what_the_plan_says_itself_needs_no_hand(method: str) -> None:
    pytest.importorskip({"to_lightning": "lightning"}.get(method, "transformers"))
    plan = replace(example_plan(), levers=(AUTOCAST,))
    assert getattr(plan, method)() == getattr(example_plan(), method)()


def test_trainers_set_what_they_have_arguments_for() -> None:
    transformers = pytest.importorskip("transformers")
    plan = replace(example_plan(), levers=(BLOCKS,))
    made = plan.to_training_arguments()
    known = transformers.TrainingArguments.__dataclass_fields__
    name = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if n in known)
    assert (made[name], made[f"{name}_kwargs"]) == (True, {"use_reentrant": False})
    pytest.importorskip("lightning")
    facts = replace(plan.model, autocast=None)
    halves = replace(plan, model=facts, levers=(WEIGHTS,))
    assert halves.to_lightning().trainer["precision"] == "bf16-true"
    with pytest.raises(UsageError, match="precision: bf16 weights, which no setting of DeepSpeed"):
        halves.to_deepspeed()  # its bf16 keeps float32 weights beside, which were not counted
    assert halves.to_deepspeed(by_hand=True)["bf16"] == {"enabled": False}


def test_stages_share_parameters_as_fsdp_does_and_not_with_settings_of_their_own() -> None:
    fsdp = AppliedLever(lever="sharding", value="FSDP2", code="fully_shard(model)")
    plan = replace(example_plan(), sharding="fsdp", levers=(fsdp,))
    assert plan.to_deepspeed()["zero_optimization"] == {"stage": 3}
    kept = replace(fsdp, value="FSDP2, kept after forward")
    with pytest.raises(UsageError, match="kept after forward"):
        replace(plan, levers=(kept,)).to_deepspeed(zero_stage=3)


def test_scripts_of_ones_own_read_which_levers_the_plan_needs() -> None:
    plan = replace(example_plan(), levers=(WEIGHTS, BLOCKS))
    labels = ["precision: bf16 weights", "checkpointing: every block"]
    assert plan.to_env()["AUTOBATCH_LEVERS"] == "; ".join(labels)
    assert f"levers: {json.dumps(labels)}" in plan.to_yaml()
    assert "AUTOBATCH_LEVERS" not in example_plan().to_env()
