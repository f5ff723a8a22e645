"""The names that users hold, pinned: a change here is a change for all of them."""

from __future__ import annotations

import inspect
import subprocess
import sys

import autobatch

NAMES = """
    Advice AutobatchError AutobatchWarning Comparison DoesNotFitError Equivalence Explanation
    FileError Footprint Frontier GpuSpec NoGpuError Plan ProbeDiedError Progress SampleError
    SpecError Sweep UnknownGpuError UsageError Window Windows Workload WorkloadError __version__
    advise batch_builder check_equivalence compare explain find_gpu predict sweep tune vary windows
""".split()

PLAN = """
    accumulation_steps allowed_bytes batch_dims budget_bytes ceiling ceiling_at_least
    ceiling_footprint ceiling_likelihood command created curve effective_batch executions
    footprint from_json gpu headroom is_sharded levers likelihood lives load loader_samples_per_s
    method micro_batch model most_bytes notes objective ooms others_bytes otherwise peak_blocks
    proven report save scale_lr seconds sharding slack_bytes speed split target timeline
    to_accelerate to_deepspeed to_env to_frame to_json to_lightning to_training_arguments
    to_yaml trials versions warnings what_if windows world_size
""".split()


def test_the_package_has_these_names_and_no_others() -> None:
    assert sorted(autobatch.__all__) == NAMES
    assert dir(autobatch) == NAMES


def test_every_name_can_be_imported() -> None:
    for name in NAMES:
        assert getattr(autobatch, name) is not None


def test_a_plan_has_these_names_and_no_others() -> None:
    assert [name for name in dir(autobatch.Plan) if not name.startswith("_")] == PLAN


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, autobatch; dir(autobatch); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]


def test_tune_and_predict_take_these_arguments() -> None:
    shared = "sample batch_dims loss optimizer gpu world_size sharding".split()
    assert parameters(autobatch.tune) == [
        *("model", "target", *shared, "headroom", "autocast", "clip_norm"),
        *("prove", "objective", "loader", "isolate", "time_limit", "cache", "progress"),
    ]
    assert parameters(autobatch.predict) == [
        *("model", "micro_batch", "accumulation_steps", *shared),
        *("autocast", "clip_norm", "progress"),
    ]
