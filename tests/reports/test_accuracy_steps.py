"""`python -m reports.accuracy` on tables of measured steps: readers, readings, what is missing."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from autobatch.memory.trace import Allocation, Mark, Trace
from autobatch.support.units import GIB, MIB
from reports.accuracy import __main__ as command
from reports.accuracy.steps import course
from reports.accuracy.steps.command import cases_of, releases_in
from reports.accuracy.steps.configuration import (
    COLUMNS,
    IncompleteError,
    Reading,
    Step,
    StepRow,
    is_table_of_steps,
)
from reports.accuracy.steps.predict import predict_step, read, run_step
from reports.accuracy.steps.published import CONFIGS, published
from reports.accuracy.steps.readers import step_of
from reports.accuracy.steps.results import Scored, scored_of, summary_of

COURSE = {
    "set": "cs336",
    "source": "EnzoDing-rgb/cs336-assignment2-systems",
    "model": "BasicsTransformerLM",
    "config": "tiny: 2 layers, d 64, ff 128, 4 heads, vocab 1000; full training step",
    "gpu": "a100-80gb",
    "world_size": "1",
    "sharding": "none",
    "precision": "fp32",
    "optimizer": "course AdamW (per-parameter loop)",
    "batch_per_gpu": "2",
    "seq_or_image": "32",
    "accumulation": "1",
    "checkpointing": "none",
    "compile": "off",
    "measured_gib": "0.02",
    "meaning": "allocated",
    "torch": "2.6",
    "notes": "",
    "url_or_repo_path": "somewhere",
}
DOCS = COURSE | {
    "set": "hf_docs",
    "source": "huggingface/transformers",
    "model": "facebook/opt-350m",
    "config": "OPTForCausalLM, attn eager, loss logits.sum(), no optimizer step",
    "precision": "fp16 pure (from_pretrained torch_dtype)",
    "torch": "2.4.0, transformers 4.45/4.46 dev",
    "url_or_repo_path": "docs; PR 33298",
}
TUNING = COURSE | {
    "set": "fms_acceleration",
    "model": "mistralai/Mistral-7B-v0.1",
    "config": "LoRA r=16 q_proj v_proj; framework=none",
    "precision": "pure bfloat16",
    "checkpointing": "full",
    "torch": "2.4.1, transformers 4.45, flash-attn 2.7",
}
TITAN = COURSE | {
    "set": "torchtitan",
    "model": "Llama-3-8B",
    "config": "bf16",
    "gpu": "h100",
    "world_size": "8",
    "sharding": "fsdp2",
    "precision": "bf16",
    "optimizer": "AdamW foreach",
    "checkpointing": "every 2nd layer",
}


def row(known: dict[str, str], **more: str) -> StepRow:
    return StepRow(values=known | more)


def test_a_table_of_steps_is_recognised_by_its_columns():
    assert is_table_of_steps(COURSE)
    assert not is_table_of_steps(("model", "batch", "usable"))


def test_shapes_and_what_runs_are_read_from_the_words_of_a_course_row():
    step = step_of(row(COURSE))
    assert step.options["layers"] == 2
    assert step.options["inner"] == 128
    assert step.options["window"] == "train"
    assert step.reading.empties_cache
    assert step.micro_batch == 2


@pytest.mark.parametrize(
    ("known", "more", "words"),
    [
        (COURSE, {"compile": "inductor"}, "compiled"),
        (COURSE, {"set": "elsewhere"}, "no known kind"),
        (COURSE, {"set": "litgpt"}, "not written anew"),
        (COURSE, {"model": "own TransformerLM"}, "own model"),
        (COURSE, {"notes": "rounded"}, "rounded"),
        (COURSE, {"notes": "read off memory_viz, unit unclear"}, "chart"),
        (COURSE, {"config": "2 layers, d 64; full training step"}, "shapes"),
        (COURSE, {"precision": "mixed"}, "precision"),
        (COURSE, {"checkpointing": "some"}, "checkpointing"),
        (COURSE, {"batch_per_gpu": "see script"}, "see script"),
        (DOCS, {"model": "nobody/nothing"}, "published shapes"),
        (DOCS, {"torch": "2.4.0", "url_or_repo_path": "docs"}, "which release"),
        (TUNING, {"config": "prefix tuning"}, "how the model is tuned"),
        (TUNING, {"sharding": "zero3"}, "sharding"),
        (TITAN, {"precision": "float8"}, "kernels are not simulated"),
        (TITAN, {"sharding": "fsdp2 + tp"}, "plan"),
    ],
)
def test_a_row_that_does_not_say_enough_says_what_is_missing(known, more, words):
    with pytest.raises(IncompleteError, match=words):
        step_of(row(known, **more))


def test_what_a_row_does_not_say_is_listed():
    step = step_of(row(COURSE, source="somebody/else", gpu="unknown"))
    assert any("hand-out" in words for words in step.assumptions)
    assert any("taken for a100-80gb" in words for words in step.assumptions)


def test_a_figure_of_one_process_is_of_a_sample_as_long_as_all_processes_make_it():
    alone = step_of(row(TUNING, seq_or_image="4096"))
    shared = step_of(row(TUNING, seq_or_image="2048", world_size="2", sharding="fsdp1 full shard"))
    assert alone.options["length"] == shared.options["length"] == 4096
    assert any("accelerate wraps" in words for words in shared.assumptions)


def test_the_release_is_that_of_the_pull_request_or_of_the_requirements():
    assert step_of(row(DOCS)).transformers == "4.46"
    assert step_of(row(TUNING)).transformers == "4.48"
    assert step_of(row(TUNING, torch="2.4.1, transformers 4.45, flash-attn 2.6")).transformers == (
        "4.45"
    )


def test_rows_that_differ_in_the_counter_alone_are_one_step():
    first, second = step_of(row(COURSE)), step_of(row(COURSE, meaning="reserved"))
    assert first.key == second.key
    assert first.key != step_of(row(COURSE, seq_or_image="64")).key


def test_a_step_survives_json():
    step = step_of(row(TITAN))
    again = Step.of_record(json.loads(json.dumps(step.as_record())))
    assert again.key == step.key


def test_names_of_models_are_known_by_their_spellings():
    assert published("EleutherAI/pythia-410m-deduped") == "pythia-410m"
    assert published("meta-llama/Meta-Llama-3.1-8B") == "llama-3-8b"
    assert published("nobody/nothing") is None


PARAMETERS = {
    "mistral-7b": 7_241_732_096,
    "llama-3-8b": 8_030_261_248,
    "llama-2-13b": 13_015_864_320,
    "mixtral-8x7b": 46_702_792_704,
    "gemma-2b": 2_506_172_416,
    "opt-350m": 331_196_416,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_shapes_have_the_published_number_of_parameters(name):
    transformers = pytest.importorskip("transformers")
    config, head, options = CONFIGS[name]
    with torch.device("meta"):
        model = getattr(transformers, head)(getattr(transformers, config)(**options))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def trace(*sizes_and_marks: Any) -> Trace:
    """Blocks that all stay, in MiB, and marks (phase, window) between them."""
    blocks, marks = [], []
    for item in sizes_and_marks:
        if isinstance(item, tuple):
            marks.append(Mark(len(blocks), item[0], item[1], 0))
        else:
            blocks.append(Allocation(item * MIB, "activations", "forward", ""))
    return Trace(
        micro_batch=1,
        accumulation_steps=1,
        blocks=tuple(blocks),
        events=tuple(range(len(blocks))),
        marks=tuple(marks),
    )


STEPS = trace(
    ("setup", 0), 32, ("inputs", 0), 2, ("step", 0), 64, ("inputs", 1), 4, ("step", 1), 128
)


@pytest.mark.parametrize(
    ("reading", "mib"),
    [
        (Reading(), 230),
        (Reading(window=0), 98),
        (Reading(window=0, phases=("inputs",)), 34),
        (Reading(window=-1, phases=("setup",)), 32),
        (Reading(phases=("inputs",), at_end=True), 102),
        (Reading(window=0, phases=("step",), from_start=True), 98),
    ],
)
def test_a_figure_is_read_where_the_script_read_it(reading, mib):
    assert read(STEPS, reading)[0] == mib * MIB


def test_a_reading_of_a_phase_that_did_not_run_fails():
    with pytest.raises(ValueError, match="nothing ran"):
        read(STEPS, Reading(phases=("evaluate",)))


def test_expandable_segments_split_what_the_default_leaves_whole():
    whole = trace(("setup", 0), ("inputs", 1), 19)
    assert read(whole, Reading())[0] >= 19 * MIB
    growing = read(whole, Reading(allocator="expandable_segments:True"))
    assert growing[0] == 19 * MIB


def test_the_course_model_keeps_scores_for_every_pair_of_positions():
    short, long = (
        run_step(step_of(row(COURSE, config=FORWARD, seq_or_image=length)))
        for length in ("256", "512")
    )
    growth = long["allocated_bytes"] - short["allocated_bytes"]
    scores = 2 * 4 * (512**2 - 256**2) * 4  # samples, heads, pairs, bytes
    assert growth > 2 * 2 * scores  # layers; powers and weights


FORWARD = "2 layers, d 64, ff 128, 4 heads, vocab 1000; forward with graph"


def test_segments_of_checkpoints_keep_less():
    plain, segments = (
        run_step(step_of(row(COURSE, seq_or_image="512", checkpointing=told)))["allocated_bytes"]
        for told in ("none", "non-reentrant, segments of 1 layers")
    )
    assert segments < plain


def test_rank_0_of_a_sharded_optimizer_has_every_second_parameter():
    parameters = [torch.nn.Parameter(torch.ones(size)) for size in (1, 2, 3)]
    optimizer = course.ShardedOptimizer(parameters, torch.optim.AdamW, 2)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert [parameters[0], parameters[2]] == list(optimizer.inner.state)


def test_the_course_optimizer_moves_against_the_gradient():
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    course.CourseAdamW([parameter]).step()
    assert (parameter < 1).all()


def test_an_error_is_a_record_with_its_cause():
    step = Step(builder="course", options={}, gpu="a100-80gb", micro_batch=1)
    (found,) = predict_step(step.as_record(), {"key": 0})
    assert "KeyError" in found["error"]


def test_pinned_releases_are_the_folders_that_hold_one(tmp_path):
    (tmp_path / "4.46.3" / "transformers").mkdir(parents=True)
    (tmp_path / "4.47.1").mkdir()
    assert releases_in(tmp_path) == {"4.46": tmp_path / "4.46.3"}
    assert releases_in(None) == {}


def test_errors_are_summarised_by_family_and_causes_counted():
    records = [COURSE | {"measured_gib": "1"}, COURSE | {"measured_gib": "OOM"}, DOCS, TITAN]
    cases = cases_of(records)
    found = {
        case.step.key: {"allocated_bytes": 1.01 * GIB, "reserved_bytes": GIB}
        for case in cases
        if case.step is not None
    }
    found[cases[2].step.key] = {"error": "no"}
    scored = scored_of(cases, found)
    facts = summary_of(cases, scored, found)
    assert [type(one) for one in scored] == [Scored, Scored]
    assert facts["by_set"]["cs336"]["median"] == pytest.approx(0.01, abs=1e-4)
    assert facts["ran_out"] == 1
    assert facts["ran_out_foretold"] == 0
    assert facts["causes"] == {"no": {"huggingface/transformers": 1}}


@pytest.mark.slow
def test_the_command_predicts_a_table_and_goes_on_where_it_stopped(tmp_path, capsys):
    table = tmp_path / "steps.csv"
    with table.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        writer.writerows([COURSE, DOCS, COURSE | {"set": "elsewhere"}])
    out = tmp_path / "out"
    assert command.main([str(table), "--out", str(out), "--workers", "1"]) == 0
    facts = json.loads((out / "summary.json").read_text())
    assert facts["rows"] == 1
    assert sum(sum(rows.values()) for rows in facts["causes"].values()) == 2
    assert any("--pinned" in cause for cause in facts["causes"])
    journal = (out / "rows.jsonl").read_text()
    assert command.main([str(table), "--out", str(out)]) == 0
    assert (out / "rows.jsonl").read_text() == journal
    assert (out / "predicted-against-measured.svg").exists()
    assert "median error" in capsys.readouterr().out
    assert Path(out / "errors.csv").read_text().count("\n") == 4


def test_a_students_own_softmax_keeps_its_powers_twice():
    def taken(source: str, layers: int) -> int:
        config = FORWARD.replace("2 layers", f"{layers} layers")
        found = run_step(step_of(row(COURSE, source=source, config=config, seq_or_image="512")))
        return int(found["allocated_bytes"])

    plain, students = (
        taken(source, 4) - taken(source, 2)
        for source in ("yyin-dev/cs336-a2", "NiuHuangxiaozi/assignment2-systems")
    )
    scores = 2 * 4 * 512**2 * 4  # samples, heads, pairs, bytes
    assert students - plain == pytest.approx(2 * scores, rel=0.05)
