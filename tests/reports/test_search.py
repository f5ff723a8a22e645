import pytest

from reports.search.bench import is_right, tasks, write_tables

BUDGET = 1000


def side(micro_batch, reserved_bytes, *, oom=False, alloc_retries=0):
    return {
        "micro_batch": micro_batch,
        "reserved_bytes": reserved_bytes,
        "oom": oom,
        "alloc_retries": alloc_retries,
    }


def record(**changed):
    return {
        "table": "ceilings",
        "key": "gpt2, 512 tokens",
        "budget_bytes": BUDGET,
        "at_least": 11,
        "method": "trace model",
        "search": [10, 11],
        "ooms": 0,
        "plain": [side(11, BUDGET), side(12, BUDGET + 1)],
    } | changed


def test_a_ceiling_is_right_if_it_fits_and_the_next_size_does_not():
    assert is_right(record())
    assert is_right(record(plain=[side(11, BUDGET), side(12, 900, oom=True)]))
    assert is_right(record(plain=[side(11, BUDGET), side(12, 900, alloc_retries=1)]))


@pytest.mark.parametrize(
    "changed",
    [
        {"plain": [side(11, BUDGET + 1), side(12, BUDGET + 2)]},
        {"plain": [side(11, BUDGET, alloc_retries=1), side(12, BUDGET + 1)]},
        {"plain": [side(11, BUDGET), side(12, BUDGET)]},
        {"search": [2, 3, 10, 11]},
        {"ooms": 1},
        {"method": "bisection"},
        {"error": "RuntimeError: it broke"},
    ],
)
def test_a_ceiling_that_is_wrong_or_dear_is_not_right(changed):
    assert not is_right(record(**changed))


def test_every_task_has_a_key_of_its_own_and_both_tables_are_written(tmp_path):
    keys = [task["key"] for task in tasks()]
    assert len(set(keys)) == len(keys)
    readme = tmp_path / "README.md"
    markers = [f"<!-- {n}: {end} -->" for n in ("ceilings", "finders") for end in ("begin", "end")]
    readme.write_text("\n".join(markers))
    finder = {
        "table": "finders",
        "key": "toma in 3GiB",
        "finder": "toma",
        "capacity": "3GiB",
        "version": "1.1.0",
        "tried": [256, 128],
        "ooms": 1,
        "found": 128,
        "effective": 256,
        "trains": True,
        "alloc_retries": 0,
    }
    write_tables([record(), record(key="broken", error="it broke"), finder], readme)
    text = readme.read_text()
    assert "| 10, 11 | 11 |" in text and "| ok |" in text
    assert "| it broke | FAILS |" in text
    assert "| 3GiB | toma | 2 (256, 128) | 1 | 128 | yes | 256, kept |" in text
