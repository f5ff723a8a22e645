"""`python -m reports.accuracy`: tables, arithmetic, workers that die, and what is rendered."""

import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autobatch.support.units import MIB
from reports.accuracy import __main__ as command
from reports.accuracy import render, score
from reports.accuracy.models import OPTIMIZERS, torchvision_name, workload_of
from reports.accuracy.predict import predict
from reports.accuracy.results import write_results
from reports.accuracy.tables import (
    KINDS,
    Row,
    Run,
    Settings,
    TableError,
    read_records,
    recognise,
    rows_of,
    sample,
    tasks_of,
)
from reports.common.journal import append, read_journal
from reports.common.pool import WorkersFailError, run_tasks

SETTINGS = Settings(
    gpu="a100-40gb", optimizer="sgd-momentum", precision="fp32", context_bytes=1000 * MIB
)
TIMM_PEAKS = """model,batch,nvidia_smi_peak_mib,usable
thin_net50,8,2000,True
thin_net50,16,3000,True
thin_net50,32,5000,True
wide_net,8,9000,True
wide_net,16,9000,False
"""
MAX_BATCH = """model,train_batch_size,train_img_size,param_count
thin_net50,48,224,1.0
wide_net,512,256,2.0
"""
XMEM = """gpu,total_gpu_bytes,model,batch,optimizer,real_oom,ground_nvml_bytes,xmem_pred
RTX 3060,12622168064,ThinNet,30,AdamW,0,2000000000,1
RTX 3060,12622168064,ThinNet,900,AdamW,1,,1
"""

# Says 100 MiB per sample; dies at a model called "wide_net", and waits for ever at "slow_net".
WORKER = """
import json, os, sys, time
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    task = json.loads(line)
    with open(os.environ["TASKS"], "a") as log:
        log.write(task["run"]["model"] + "\\n")
    for index, (key, size) in enumerate(task["keys"].items()):
        if task["run"]["model"] == "wide_net":
            sys.stderr.write("the net is too wide\\n")
            os._exit(7)
        if task["run"]["model"] == "slow_net" and index == 1:
            time.sleep(60)
        print(json.dumps({"key": key, "reserved_bytes": size * 100 * 2**20, "ceiling": size + 1,
                          "limit_reached": False, "method": "trace model"}), flush=True)
    print(json.dumps({"done": True}), flush=True)
"""


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """Give the command of a worker that makes figures up, and the log of its tasks."""
    script, log = tmp_path / "worker.py", tmp_path / "tasks.log"
    script.write_text(WORKER)
    log.touch()
    monkeypatch.setenv("TASKS", str(log))
    monkeypatch.setattr(command, "WORKER", (sys.executable, "-S", str(script)))
    return log


@pytest.fixture
def table(tmp_path):
    def write(text, name="table.csv"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


@pytest.fixture
def undrawn(monkeypatch):
    """Leave the charts out, which take longer than the rest."""
    for name in ("scatter", "families", "ceilings", "verdicts"):
        monkeypatch.setattr(f"reports.accuracy.charts.{name}", lambda *_: None)
    monkeypatch.setattr("reports.accuracy.results.write", lambda *_: None)


def read_rows(path, settings=SETTINGS):
    kind, records = read_records(path)
    return kind, rows_of(kind, records, settings)


def a_row(model="net", micro_batch=8, measured_bytes=1, **run):
    options = {"kind": "timm-peaks", "gpu": "a100-40gb", "optimizer": "sgd", "precision": "fp32"}
    return Row(
        run=Run(model=model, **(options | run)),
        micro_batch=micro_batch,
        measured_bytes=measured_bytes,
    )


def a_peak(predicted, measured, **row):
    return score.Peak(
        row=a_row(measured_bytes=measured, **row),
        reserved_bytes=predicted,
        context_bytes=0,
        measured_bytes=measured,
    )


# Tables


@pytest.mark.parametrize(
    ("text", "kind"), [(TIMM_PEAKS, "timm-peaks"), (MAX_BATCH, "max-batch"), (XMEM, "xmem")]
)
def test_a_table_is_recognised_by_its_columns(table, text, kind):
    assert read_records(table(text))[0] is KINDS[kind]


def test_columns_of_no_known_kind_are_named():
    with pytest.raises(TableError, match="model, seconds are of no known kind"):
        recognise(["model", "seconds"])


def test_unusable_rows_are_left_out(table):
    _, rows = read_rows(table(TIMM_PEAKS))
    assert [(row.run.model, row.micro_batch) for row in rows][-1] == ("wide_net", 8)
    assert rows[0].measured_bytes == 2000 * MIB


def test_columns_win_over_options(table):
    _, (row, _) = read_rows(table(XMEM))
    assert (row.run.gpu, row.run.optimizer) == ("RTX 3060", "adamw")


def test_a_run_that_ran_out_of_memory_has_no_measured_peak(table):
    _, (_, row) = read_rows(table(XMEM))
    assert row.ran_out and row.measured_bytes is None


def test_a_figure_that_is_no_number_is_named_with_its_line(table):
    with pytest.raises(TableError, match="line 3"):
        read_rows(table(TIMM_PEAKS.replace("thin_net50,16", "thin_net50,many")))


def test_rows_of_one_model_are_one_task(table):
    _, rows = read_rows(table(TIMM_PEAKS))
    tasks = tasks_of(rows)
    assert [list(task["keys"].values()) for task in tasks] == [[8, 16, 32], [8]]


def test_a_ceiling_depends_on_the_context_and_a_peak_does_not(table):
    other = Settings(gpu="t4", optimizer="sgd", precision="fp32", context_bytes=MIB)
    same = Settings(gpu="t4", optimizer="sgd", precision="fp32", context_bytes=2 * MIB)
    for text, is_same in ((TIMM_PEAKS, True), (MAX_BATCH, False)):
        keys = [[row.key for row in read_rows(table(text), s)[1]] for s in (other, same)]
        assert (keys[0] == keys[1]) is is_same


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 9))), st.data())
def test_tasks_hold_each_key_that_is_not_done_exactly_once(runs, data):
    rows = [a_row(model, size) for model, size in runs]
    keys = {row.key for row in rows}
    done = data.draw(st.sets(st.sampled_from(sorted(keys)))) if keys else set()
    tasks = tasks_of(rows, done)
    asked = [key for task in tasks for key in task["keys"]]
    assert sorted(asked) == sorted(keys - done)
    assert len({task["run"]["model"] for task in tasks}) == len(tasks)


@given(st.integers(1, 50), st.integers(1, 60))
def test_a_sample_is_the_same_every_time(count, wanted):
    rows = [a_row(micro_batch=size) for size in range(1, count + 1)]
    drawn = sample(rows, wanted)
    assert drawn == sample(rows, wanted) and len(drawn) == min(count, wanted)


# Arithmetic

POSITIVE = st.integers(1, 2**40)


@given(POSITIVE, POSITIVE)
def test_a_signed_error_gives_the_prediction_back(predicted, measured):
    error = score.signed_error(predicted, measured)
    # 1 + error rounds to 16 digits of whichever is larger
    assert measured * (1 + error) == pytest.approx(predicted, rel=1e-6, abs=1e-12 * measured)
    assert (error > 0) == (predicted > measured)


@given(st.lists(st.tuples(POSITIVE, POSITIVE), min_size=1))
def test_statistics_agree_with_their_definitions(pairs):
    errors = [score.signed_error(*pair) for pair in pairs]
    found = score.statistics_of(errors)
    sizes = sorted(map(abs, errors))
    assert found["rows"] == len(errors)
    assert sizes[0] <= found["median"] <= found["p90"] * (1 + 1e-9)
    assert found["p90"] <= sizes[-1] * (1 + 1e-9)
    assert found["under_predicted"] == pytest.approx(sum(e < 0 for e in errors) / len(errors))
    assert found["within_5_percent"] == pytest.approx(sum(s <= 0.05 for s in sizes) / len(errors))


@given(st.integers(1, 4096))
def test_a_next_size_up_is_the_next_of_timms_ladder(ran):
    ladder = sorted({2**k for k in range(14)} | {3 * 2**k for k in range(13)})
    assert score.next_size_up(ran) == min(size for size in ladder if size > ran)


@given(st.integers(1, 511), st.integers(0, 1024))
def test_a_bracket_holds_what_ran_and_not_the_next_size_up(ran, ceiling):
    verdict = score.verdict_of(ceiling, ran)
    assert (verdict == "inside") == (ran <= ceiling < score.next_size_up(ran))
    assert (verdict == "below") == (ceiling < ran)


def test_what_ran_at_the_first_size_has_no_upper_end():
    assert score.verdict_of(5000, 512) == "inside"
    assert score.verdict_of(511, 512) == "below"


@given(st.integers(-1000, 1000), st.integers(-20, 20))
def test_what_is_missing_is_split_into_a_constant_and_a_part_per_sample(constant, slope):
    peaks = [
        a_peak(100 * n * MIB, (100 * n + constant + slope * n) * MIB, micro_batch=n)
        for n in (16, 32, 64)
    ]
    (line,) = score.residual_lines(peaks)
    assert line["constant_mib"] == pytest.approx(constant, abs=1e-6)
    assert line["per_sample"] == pytest.approx(slope / 100, abs=1e-9)


def test_the_best_context_is_the_one_that_was_left_out():
    peaks = [a_peak(n * 100 * MIB, (n * 100 + 750) * MIB, micro_batch=n) for n in (8, 16, 32)]
    assert score.best_context(peaks)["mib"] == 750


@pytest.mark.parametrize(
    ("model", "family"),
    [
        ("resnetv2_50d_gn", "resnetv2"),
        ("cs3darknet_l", "cs3darknet"),
        ("res2net101_26w_4s", "res2net"),
        ("legacy_seresnext101_32x4d", "seresnext"),
        ("EleutherAI/gpt-neo-125M", "gpt"),
        ("RegNetX400MF", "regnetx"),
        ("ConvNeXtBase", "convnext"),
        ("tf", "tf"),
    ],
)
def test_a_family_is_the_name_without_origin_and_depth(model, family):
    assert score.family_of(model) == family


# Workers


def test_one_models_crash_is_that_models(table, tmp_path, worker, undrawn):
    out = tmp_path / "out"
    assert command.main([str(table(TIMM_PEAKS)), "--out", str(out), "--workers", "2"]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["rows"] == 3
    ((cause, models),) = summary["causes"].items()
    assert models == ["wide_net"] and "exit code 7: the net is too wide" in cause


def test_an_interrupted_run_goes_on_where_it_stopped(table, tmp_path, worker, undrawn):
    path, out = table(TIMM_PEAKS), tmp_path / "out"
    _, rows = read_rows(path)
    out.mkdir()
    journal = out / command.JOURNAL
    for row in rows[:2]:
        append(journal, {"key": row.key, "reserved_bytes": 7 * MIB, "method": "executed"})
    with journal.open("a") as stream:
        stream.write('{"key": "half')

    def tasks_of_a_run(*options):
        before = len(worker.read_text().split())
        assert command.main([str(path), "--out", str(out), "--workers", "1", *options]) == 0
        return worker.read_text().split()[before:]

    assert sorted(tasks_of_a_run()) == ["thin_net50", "wide_net"]
    records = read_journal(journal)
    assert [records[row.key].get("reserved_bytes") for row in rows] == [
        7 * MIB, 7 * MIB, 3200 * MIB, None,
    ]  # fmt: skip
    assert tasks_of_a_run() == []
    assert tasks_of_a_run("--retry") == ["wide_net"]
    assert sorted(tasks_of_a_run("--fresh")) == ["thin_net50", "wide_net"]


def test_a_model_that_takes_too_long_costs_its_own_rows(worker):
    rows = [a_row("slow_net", 8), a_row("slow_net", 16), a_row("quick_net", 8)]
    records = []
    run_tasks(
        tasks_of(rows),
        command=command.WORKER,
        workers=1,
        record=records.append,
        time_limit_s=0.3,
    )
    assert [record.get("error") for record in records] == [None, "took more than 0.3 s", None]


def test_a_model_that_takes_too_much_memory_costs_its_own_rows(worker):
    rows = [a_row("slow_net", 8), a_row("slow_net", 16)]
    records = []
    run_tasks(
        tasks_of(rows),
        command=command.WORKER,
        workers=1,
        record=records.append,
        memory_limit_bytes=2**20,
    )
    errors = [record.get("error") for record in records]
    assert errors[-1] == "took more than 1.00 MiB of memory"


def test_a_worker_that_never_gets_ready_ends_the_run():
    with pytest.raises(WorkersFailError, match="exit code 3"):
        run_tasks(
            tasks_of([a_row()]),
            command=(sys.executable, "-S", "-c", "raise SystemExit(3)"),
            workers=1,
            record=print,
        )


# Predictions


def test_an_unknown_model_is_a_cause_and_no_crash():
    row = a_row("no_such_net")
    pytest.importorskip("timm")
    (record,) = predict(row.run, {row.key: 8})
    assert "unknown to this timm" in record["error"]


def test_an_unknown_optimizer_is_a_cause():
    row = a_row("resnet10t", optimizer="lion")
    (record,) = predict(row.run, {row.key: 8})
    assert record["error"] == "KeyError: 'lion'"


def test_the_commands_optimizers_are_those_that_exist():
    assert set(command.OPTIMIZERS) == set(OPTIMIZERS)


def test_many_sizes_are_predicted_as_each_would_be_executed():
    pytest.importorskip("timm")
    run = a_row("test_vit", gpu="8GiB").run
    together = list(predict(run, {"a": 4, "b": 9, "c": 17}))
    assert {record["method"] for record in together} == {"trace model"}
    (alone,) = predict(run, {"c": 17})
    assert alone["method"] == "executed"
    assert alone["reserved_bytes"] == together[-1]["reserved_bytes"]


def test_a_ceiling_is_searched_for_a_table_of_largest_batches():
    pytest.importorskip("timm")
    run = a_row("test_vit", kind="max-batch", gpu="1GiB", ceiling_context_bytes=700 * MIB).run
    (record,) = predict(run, {"a": 512})
    assert 1 <= record["ceiling"] < 1024


def test_xmems_runs_have_its_image_size_and_its_classes():
    pytest.importorskip("torchvision")
    assert torchvision_name("RegNetX400MF") == "regnet_x_400mf"
    run = a_row("MobileNetV3Small", kind="xmem", gpu="rtx-3060").run
    images, labels = workload_of(run).batch(3)
    assert images.shape == (3, 3, 86, 86) and labels.max() < 10
    (record,) = predict(run, {"a": 4})
    assert record["reserved_bytes"] > 0


# What is written


def test_peaks_are_written_with_their_errors_and_charts(table, tmp_path, worker):
    out = tmp_path / "out"
    command.main([str(table(TIMM_PEAKS)), "--out", str(out), "--context", "1000MiB"])
    lines = (out / "errors.csv").read_text().splitlines()
    assert lines[1].startswith("thin_net50,thin,a100-40gb,sgd-momentum,32,5000,4200,3200,-0.16")
    assert "exit code 7" in lines[-1]
    for stem in ("predicted-against-measured", "error-by-family"):
        assert (out / f"{stem}.png").read_bytes()[:4] == b"\x89PNG"
        assert "<svg" in (out / f"{stem}.svg").read_text()
    assert (out / ".gitignore").read_text() == "*\n"


def test_brackets_are_scored(table, tmp_path, worker):
    out = tmp_path / "out"
    path = table(MAX_BATCH.replace("wide_net", "other_net"))
    assert command.main([str(path), "--out", str(out)]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["inside"] == 1 and summary["rows"] == 2
    assert summary["by_family"]["thin"] == {"inside": 1, "below": 0, "above": 0}


def test_runs_out_of_memory_are_counted_apart(table, tmp_path, worker, undrawn):
    out = tmp_path / "out"
    assert command.main([str(table(XMEM)), "--out", str(out)]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["rows"], summary["ran_out"], summary["ran_out_foretold"]) == (1, 1, 1)


def test_a_summary_holds_no_measured_figure(table, tmp_path, worker, undrawn):
    out = tmp_path / "out"
    command.main([str(table(TIMM_PEAKS)), "--out", str(out)])
    text = (out / "summary.json").read_text()
    assert not any(figure in text for figure in ("2000", "3000", "5000", "9000"))


def test_nothing_predicted_is_still_a_result(table, tmp_path):
    kind, rows = read_rows(table(TIMM_PEAKS))
    found = {row.key: {"key": row.key, "error": "no luck"} for row in rows}
    shown = write_results(kind, rows, found, SETTINGS, tmp_path, words="command")
    assert "| rows without a prediction | 4 |" in shown and "no luck" in shown


def test_the_readme_is_rendered_from_summaries_and_the_rest_of_it_stays(table, tmp_path, worker):
    folder = tmp_path / "report"
    folder.mkdir()
    readme = folder / "README.md"
    readme.write_text(f"# Title\n{render.BEGIN}\nold\n{render.END}\nThe end.\n")
    outs = [tmp_path / "peaks", tmp_path / "brackets"]
    for text, out in zip((TIMM_PEAKS, MAX_BATCH), outs, strict=True):
        command.main([str(table(text)), "--out", str(out)])
    assert command.main(["render", *map(str, outs), "--folder", str(folder)]) == 0
    text = readme.read_text()
    assert text.startswith("# Title") and text.endswith("The end.\n") and "old" not in text
    assert "python -m reports.accuracy table.csv" in text and str(tmp_path) not in text
    assert set(json.loads((folder / "results.json").read_text())) == {"timm-peaks", "max-batch"}
    command.main(["render", "--folder", str(folder)])
    assert readme.read_text() == text


def test_the_committed_readme_is_rendered_from_the_committed_results(tmp_path):
    names = ("README.md", "results.json")
    for name in names:
        (tmp_path / name).write_bytes((render.FOLDER / name).read_bytes())
    render.render([], tmp_path)
    for name in names:
        assert (tmp_path / name).read_bytes() == (render.FOLDER / name).read_bytes()


@pytest.mark.parametrize(
    "arguments", [["missing.csv"], ["{table}", "--gpu", "h9000"], ["{table}", "--context", "much"]]
)
def test_what_cannot_be_understood_is_said_before_any_work(table, tmp_path, arguments, capsys):
    path = str(table(TIMM_PEAKS))
    words = [word.format(table=path) for word in arguments]
    assert command.main([*words, "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err and not (tmp_path / "out").exists()
