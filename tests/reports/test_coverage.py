"""`python -m reports.coverage`: what is tried, workers that die, and what is rendered."""

import csv
import io
import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autobatch.support.units import GIB, MIB
from reports.common.journal import append, read_journal
from reports.common.shrink import LEVELS, Level, merged, shrink
from reports.coverage import __main__ as command
from reports.coverage import memory, models, render, results, summary, text
from reports.coverage import worker as worker_process
from reports.coverage.subjects import Subject, selected, subjects_of, tasks_of
from reports.coverage.trial import NO_INPUTS, attempt

SMALLEST = LEVELS[0]
TIMM = [Subject("timm", name) for name in ("thin_net", "wide_net", "slow_net", "odd_net")]
TYPES = [Subject("transformers", name) for name in ("bart", "no_head")]

# Predicts in 2 s; dies at "wide_net", waits at "slow_net", fails at "odd_net".
WORKER = """
import json, os, sys, time
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    task = json.loads(line)
    (key,) = task["keys"]
    with open(os.environ["TASKS"], "a") as log:
        log.write(key + "\\n")
    record = {"key": key, "library": task["library"], "name": task["name"],
              "outcome": "predicted", "seconds": 2.0, "cpu_seconds": 1.0,
              "peak_rss_bytes": 700 * 2**20, "peak_rss_of": "model", "loss": "inferred",
              "warnings": ["shapes", "moved"], "parameters": 10}
    if task["name"] == "wide_net":
        sys.stderr.write("the net is too wide\\n")
        os._exit(7)
    if task["name"] == "slow_net":
        time.sleep(60)
    if task["name"] == "odd_net":
        record |= {"outcome": "failed", "cause": "it is odd", "error": "OddError: x | y"}
    if task["name"] == "no_head":
        record |= {"outcome": "not built", "cause": "no Auto class builds it", "error": "none"}
    print(json.dumps(record), flush=True)
    print(json.dumps({"done": True}), flush=True)
"""


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """Give the command a worker that makes figures up, and names to try; return its log."""
    script, log = tmp_path / "worker.py", tmp_path / "tasks.log"
    script.write_text(WORKER)
    log.touch()
    monkeypatch.setenv("TASKS", str(log))
    monkeypatch.setattr(command, "WORKER", (sys.executable, "-S", str(script)))
    known = {"timm": TIMM, "transformers": TYPES}
    monkeypatch.setattr(command, "subjects_of", lambda library: known[library])
    return log


@pytest.fixture
def undrawn(monkeypatch):
    """Leave the charts out, which take longer than the rest."""
    monkeypatch.setattr(results, "write", lambda *_: None)


def a_record(name, library="timm", outcome="predicted", **more):
    figures = {"seconds": 1.0, "cpu_seconds": 1.0, "peak_rss_bytes": MIB, "peak_rss_of": "model"}
    found = {"key": f"{library}:{name}", "library": library, "name": name, "outcome": outcome}
    return found | (figures if outcome == "predicted" else {"cause": "c", "error": "e"}) | more


# Subjects


@pytest.mark.parametrize(("library", "least"), [("timm", 1000), ("transformers", 300)])
def test_every_name_of_a_library_is_a_subject(library, least):
    pytest.importorskip(library)
    subjects = subjects_of(library)
    assert len(subjects) == len({subject.key for subject in subjects}) > least


def test_names_are_selected_as_a_shell_would():
    chosen = selected([*TIMM, *TYPES], only="timm", match="*i*_net")
    assert [subject.name for subject in chosen] == ["thin_net", "wide_net"]
    assert selected([*TIMM, *TYPES]) == [*TIMM, *TYPES]


def test_every_subject_is_a_task_of_its_own():
    tasks = tasks_of(TYPES)
    assert [task["keys"] for task in tasks] == [[subject.key] for subject in TYPES]
    assert tasks[-1]["name"] == TYPES[-1].name


# Small configs

ENCODER = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}


def test_widths_and_heads_are_divided_alike_in_nested_configs_too():
    config = {
        "text_config": {**ENCODER, "num_key_value_heads": 4, "head_dim": 64},
        "vision_config": {"hidden_size": 1280, "num_attention_heads": 16, "image_size": 224},
        "projection_dim": 512,
    }
    small = shrink(config, Level(widths=True))
    assert small == {
        "text_config": {
            "hidden_size": 192,
            "num_attention_heads": 3,
            "intermediate_size": 768,
            "num_key_value_heads": 1,
            "head_dim": 64,
        },
        "vision_config": {"hidden_size": 320, "num_attention_heads": 4, "image_size": 224},
        "projection_dim": 128,
    }


@given(
    st.lists(
        st.tuples(st.integers(1, 64), st.integers(1, 16), st.integers(1, 8)), min_size=1, max_size=3
    )
)
def test_a_head_keeps_its_size_and_groups_of_heads_stay_whole(parts):
    config = {
        f"part_{index}": {
            "hidden_size": heads * groups * size,
            "num_attention_heads": heads * groups,
            "num_key_value_heads": groups,
        }
        for index, (heads, groups, size) in enumerate(parts)
    }
    small = shrink(config, Level(widths=True))
    for name, part in config.items():
        cut = small[name]
        assert (
            cut["hidden_size"] * part["num_attention_heads"]
            == part["hidden_size"] * cut["num_attention_heads"]
        )
        assert cut["num_attention_heads"] % cut["num_key_value_heads"] == 0


def test_as_many_layers_stay_as_there_are_kinds():
    config = {
        "num_hidden_layers": 12,
        "layer_types": ["linear", "linear", "linear", "full"] * 3,
        "no_rope_layers": [1, 1, 0, 1] * 3,
        "out_indices": [3, 12],
        "depths": [3, 9, 1],
    }
    assert shrink(config, Level(layers=True)) == {
        "num_hidden_layers": 4,
        "layer_types": ["linear", "linear", "linear", "full"],
        "no_rope_layers": [1, 1, 0, 1],
        "out_indices": [3, 4],
        "depths": [2, 2, 1],
    }


def test_special_tokens_stay_inside_a_smaller_vocabulary_and_differ():
    config = {
        "text_config": {"vocab_size": 32_000, "pad_token_id": 0, "eos_token_id": [2, 31_999]},
        "image_token_id": 31_000,
        "video_token_id": 31_001,
    }
    small = shrink(config, Level(vocabulary=True))
    assert small["text_config"]["vocab_size"] == 1024 and small["text_config"]["pad_token_id"] == 0
    moved = [small["image_token_id"], small["video_token_id"]]
    assert moved == [1022, 1023]


def test_what_defaults_leave_open_is_filled_in_and_nothing_else():
    config = {**ENCODER, "head_dim": None, "num_key_value_heads": 3, "vocab_size": None}
    filled = shrink(config, Level(completed=True))
    assert filled == config | {"head_dim": 64, "vocab_size": 1024}


def test_shrinking_leaves_the_config_as_it_is():
    config = {"text_config": dict(ENCODER), "num_hidden_layers": 9, "layer_types": ["a"] * 9}
    before = json.dumps(config)
    for level in LEVELS:
        shrink(config, level)
    assert json.dumps(config) == before and shrink(config, LEVELS[-1]) == config


def test_a_stated_field_of_a_nested_config_leaves_its_neighbours():
    assert merged({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 7}}) == {
        "a": {"b": 7, "c": 2},
        "d": 3,
    }


@pytest.mark.parametrize("kind", ["gpt2", "clip", "t5"])
def test_small_configs_of_transformers_build_small_models(kind):
    pytest.importorskip("transformers")
    candidate = next(models.candidates(Subject("transformers", kind)))
    assert candidate.cut == str(SMALLEST)
    parameters = list(candidate.model.parameters())
    assert {p.device.type for p in parameters} == {"meta"}
    assert sum(p.numel() for p in parameters) < 20e6


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        ("sam_mask_decoder", models.NO_HEAD),
        ("bark", models.NO_FORWARD),
        ("sam2_video", models.NO_BATCH),
    ],
)
def test_a_type_without_a_model_that_trains_is_not_built(kind, cause):
    pytest.importorskip("transformers")
    record = attempt(Subject("transformers", kind))
    assert (record["outcome"], record["cause"]) == ("not built", cause)


# A trial


def test_a_prediction_is_recorded_with_what_it_took():
    pytest.importorskip("timm")
    record = attempt(Subject("timm", "test_vit"))
    assert record["outcome"] == "predicted" and record["loss"] == "inferred"
    assert record["device_bytes"] > record["reserved_bytes"] >= record["allocated_bytes"] > 0
    assert 0 < record["seconds"] < 60 and record["micro_batch"] == 2
    assert "160 x 160" in record["inputs"] and record["parameters"] > 1e5
    assert record["peak_rss_bytes"] >= record["rss_before_bytes"] > 0


def test_a_model_whose_inputs_are_unknown_asks_for_a_sample(monkeypatch):
    from torch import nn

    candidate = models.Candidate(nn.ReLU())
    monkeypatch.setattr("reports.coverage.trial.candidates", lambda _: iter([candidate]))
    record = attempt(TIMM[0])
    assert record["outcome"] == "failed" and record["cause"] == NO_INPUTS
    assert "sample=" in record["error"] and not any(f.startswith("/") for f in record["frames"])


def test_one_config_that_is_predicted_is_enough(monkeypatch):
    from torch import nn

    tried = [models.Candidate(m) for m in (nn.ReLU(), nn.Linear(3, 3), nn.Linear(5, 5))]
    monkeypatch.setattr("reports.coverage.trial.candidates", lambda _: iter(tried))
    record = attempt(TIMM[0])
    assert record["outcome"] == "predicted" and record["parameters"] == 12


def test_the_peak_of_memory_begins_anew_where_the_system_allows():
    block = b"x" * (64 * MIB)
    del block
    scope = memory.begin_peak()
    if scope == "model":
        assert memory.peak_rss_bytes() < (memory.resident_now_bytes() or 0) + 32 * MIB


# Workers


def test_one_models_crash_is_that_models(tmp_path, worker, undrawn, capsys):
    out = tmp_path / "out"
    options = ["--out", str(out), "--workers", "2", "--time-limit", "0.5"]
    assert command.main(options) == 0
    facts = json.loads((out / "summary.json").read_text())
    figures = facts["libraries"]["timm"]
    assert (figures["predicted"], figures["failed"], figures["coverage"]) == (1, 3, 0.25)
    causes = {line["name"]: line["cause"] for line in facts["failures"]}
    assert causes == {
        "wide_net": summary.DIED, "slow_net": summary.TOO_SLOW, "odd_net": "it is odd",
    }  # fmt: skip
    assert "exit code 7: the net is too wide" in capsys.readouterr().out
    assert (out / ".gitignore").read_text() == "*\n"


def test_a_run_goes_on_where_it_stopped(tmp_path, worker, undrawn):
    out = tmp_path / "out"
    out.mkdir()
    journal = out / command.JOURNAL
    append(journal, a_record("thin_net", seconds=7.0))
    with journal.open("a") as stream:
        stream.write('{"key": "half')

    def tried(*options):
        before = len(worker.read_text().split())
        words = ["--out", str(out), "--workers", "1", "--match", "*[dn]_*", *options]
        assert command.main(words) == 0
        return [key.partition(":")[2] for key in worker.read_text().split()[before:]]

    assert tried() == ["odd_net"]
    assert read_journal(journal)["timm:thin_net"]["seconds"] == 7.0
    assert tried() == []
    assert tried("--retry") == ["odd_net"]
    assert tried("--fresh", "--only", "timm") == ["thin_net", "odd_net"]
    assert read_journal(journal)["timm:thin_net"]["seconds"] == 2.0


@pytest.mark.parametrize(("models", "growth"), [(2, 10 * GIB), (9, -GIB)])
def test_a_worker_starts_anew_before_it_says_that_the_last_task_is_done(
    monkeypatch, models, growth
):
    monkeypatch.setattr(worker_process, "attempt", lambda subject: {"key": subject.key})
    monkeypatch.setattr(worker_process, "MODELS", models)
    monkeypatch.setattr(worker_process, "GROWTH_BYTES", growth)
    tasks = [json.dumps({"library": "timm", "name": name}) for name in "abc"]
    answers = io.StringIO()
    assert worker_process.work(tasks, answers)
    said = [json.loads(line) for line in answers.getvalue().splitlines()]
    done = {"done": True}
    first = [{"key": "timm:a"}]
    assert said == (first if models == 9 else [*first, done, {"key": "timm:b"}])


def test_a_worker_ends_with_its_tasks(monkeypatch):
    monkeypatch.setattr(worker_process, "attempt", lambda subject: {"key": subject.key})
    answers = io.StringIO()
    assert not worker_process.work([json.dumps({"library": "timm", "name": "a"})], answers)
    assert answers.getvalue().splitlines()[-1] == json.dumps({"done": True})


def test_a_name_that_nothing_has_is_said_before_any_work(tmp_path, worker, capsys):
    assert command.main(["--match", "nothing*", "--out", str(tmp_path / "out")]) == 2
    assert "nothing*" in capsys.readouterr().err and not (tmp_path / "out").exists()


# Figures


@given(st.lists(st.sampled_from(["predicted", "failed", "not built", None]), max_size=30))
def test_every_name_is_counted_once(outcomes):
    subjects = [Subject("timm", str(index)) for index in range(len(outcomes))]
    records = {
        f"timm:{index}": a_record(str(index), outcome=outcome)
        for index, outcome in enumerate(outcomes)
        if outcome
    }
    facts = summary.summarise(subjects, records)
    timm = facts["libraries"]["timm"]
    assert timm["listed"] == (
        timm["predicted"] + timm["failed"] + timm["not_built"] + timm["not_tried"]
    )
    assert timm["built"] == timm["predicted"] + timm["failed"]
    if timm["built"]:
        share = outcomes.count("predicted") / timm["built"]
        assert timm["coverage"] == pytest.approx(share, abs=1e-4)
    assert len(facts["failures"]) == outcomes.count("failed")


def test_figures_of_time_and_memory_are_those_of_what_was_predicted():
    names = [str(index) for index in range(11)]
    records = {
        f"timm:{name}": a_record(name, seconds=int(name), peak_rss_bytes=int(name) * GIB // 5)
        for name in names
    }
    records["timm:x"] = a_record("x", outcome="failed")
    subjects = [Subject("timm", name) for name in (*names, "x")]
    timm = summary.summarise(subjects, records)["libraries"]["timm"]
    assert timm["seconds"] == {"median": 5, "p90": 9, "largest": 10, "largest_name": "10"}
    assert timm["rss_above_target"] == 5


def test_names_that_are_no_longer_listed_do_not_count():
    facts = summary.summarise(TIMM[:1], {"timm:gone": a_record("gone")})
    assert facts["libraries"]["timm"]["not_tried"] == 1 and not facts["failures"]


# What is written


def test_every_row_is_in_the_table(tmp_path, worker, undrawn):
    command.main(["--out", str(tmp_path / "out"), "--match", "*t*", "--time-limit", "0.5"])
    with (tmp_path / "out" / "coverage.csv").open() as stream:
        rows = {row["name"]: row for row in csv.DictReader(stream)}
    assert rows["thin_net"]["warnings"] == "shapes; moved"
    assert rows["thin_net"]["peak_rss_bytes"] == str(700 * MIB)
    assert rows["odd_net"]["error"] == "OddError: x | y"


def test_causes_are_rendered_the_most_frequent_first():
    records = {
        **{f"timm:{i}": a_record(str(i), outcome="failed", cause="rare") for i in range(1)},
        **{f"timm:{i}": a_record(str(i), outcome="failed", cause="often") for i in range(1, 4)},
        "timm:4": a_record("4", outcome="not built", cause=models.NO_HEAD),
    }
    facts = summary.summarise([Subject("timm", str(i)) for i in range(5)], records)
    shown = text.failures(facts)
    assert shown.index("Often: 3.") < shown.index("Rare: 1.")
    assert "`4`." in text.not_built(facts)


def test_the_readme_is_rendered_and_the_rest_of_it_stays(tmp_path, worker):
    folder, out = tmp_path / "report", tmp_path / "out"
    folder.mkdir()
    readme = folder / "README.md"
    readme.write_text(f"# Title\n{render.BEGIN}\nold\n{render.END}\nThe end.\n")
    command.main(["--out", str(out), "--time-limit", "0.5"])
    assert command.main(["render", str(out), "--folder", str(folder)]) == 0
    shown = readme.read_text()
    assert shown.startswith("# Title") and shown.endswith("The end.\n") and "old" not in shown
    assert "| **coverage** | **25.0 %** (target 99 %) | **100.0 %** (target 95 %) |" in shown
    assert "OddError: x \\| y" in shown and str(tmp_path) not in shown
    for name in render.FILES:
        assert (folder / name).read_bytes() == (out / name).read_bytes()
    command.main(["render", "--folder", str(folder)])
    assert readme.read_text() == shown


def test_the_committed_readme_is_rendered_from_the_committed_results(tmp_path):
    names = ("README.md", "summary.json")
    if not (render.FOLDER / names[1]).exists():
        pytest.skip("no run has been taken in")
    for name in names:
        (tmp_path / name).write_bytes((render.FOLDER / name).read_bytes())
    render.render(None, tmp_path)
    for name in names:
        assert (tmp_path / name).read_bytes() == (render.FOLDER / name).read_bytes()


def test_errors_do_not_say_where_files_lie_on_this_machine() -> None:
    from reports.coverage.trial import _FOLDERS

    said = "neither in <module 'a.b' from '/home/me/lib/a/b.py'> nor for //: 'NoneType'"
    assert _FOLDERS.sub("", said) == "neither in <module 'a.b' from 'b.py'> nor for //: 'NoneType'"
