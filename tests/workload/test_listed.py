"""Each rule by which a list is one of samples or of fields, on a list that it decides."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from autobatch.errors import SampleError
from autobatch.workload.listed import RULES, Case, Listed, Rule, has_samples, rule_for
from autobatch.workload.sample import rows_of

IMAGE, LABELS, IDS = torch.zeros(3, 8, 8), torch.zeros(2), torch.zeros(6, 9)
LABELS_OF_IDS = torch.zeros(6)


def case(
    node: Any, *, path: tuple[str, ...] = ("a",), rows: int | None = None, **known: Any
) -> Case:
    fields = {} if rows is None else {("y",): torch.zeros(rows)}
    return Case(seq=Listed(path, node), fields=fields, **known)


DECIDED = {
    "batch_dims says so": case([IMAGE], stated="samples"),
    "batch_dims says where their samples are": case([IMAGE], stated="fields"),
    "samples are all of one kind": case([LABELS, IDS], path=()),
    "sequences of unequal length may be samples, or fields of one sample": case(
        [torch.zeros(3), torch.zeros(2)], path=()
    ),
    "each entry may be a batch of its own, or a sample of its own length": case(
        [(torch.zeros(n, 5), torch.zeros(n)) for n in (4, 7)], path=()
    ),
    "fields have as many rows as each other": case([torch.zeros(3), torch.zeros(2)]),
    "by chance another list is as long: views have the rows of the batch": case(
        [{"input_ids": LABELS}] * 2, rows=2, lengths={2}
    ),
    "lists of equal length belong together": case([IMAGE] * 2, lengths={2}),
    "each sample has boxes of its own": case([{"boxes": LABELS}] * 2, rows=2),
    "token ids are stacked": case([{"input_ids": LABELS}] * 2, rows=2),
    "both its length and its rows are the batch's": case([LABELS] * 2, rows=2),
    "its length is the batch's": case([IMAGE] * 2, rows=2),
    "its rows are the batch's": case([IDS] * 2, rows=6),
    "a list of images may be one of batches whose size is like a number of channels": case(
        [IMAGE] * 2, path=()
    ),
    "a batch's fields are not in a list of their own": case([IDS] * 2),
    "as many numbers beside it may be one of each sample, or a size": case(
        (IMAGE, IMAGE), short={2}
    ),
    "collate functions give tuples of fields": case((IDS, IDS), path=()),
    "an item has a label of its own": case([(IMAGE, 3)] * 2, path=()),
    "default_collate makes lists of fields, and states are kept in tuples": case(
        [[IDS, IDS], [IDS, IDS]], path=()
    ),
    "each entry may be a batch of its own, or a sample": case([(IDS, LABELS_OF_IDS)] * 2, path=()),
    "items that were not collated are tuples": case([(IDS, LABELS_OF_IDS)] * 5, path=()),
    "samples have the same keys": case([{"x": IDS}, {"y": IDS}]),
    "a view is stacked": case([{"input_ids": IDS}] * 2),
    "each sample has boxes, or one image": case([{"image": IMAGE}] * 2),
    "a vector may be one sample's, or a number for each": case([{"x": LABELS}] * 2),
    "stacked rows are what a tensor mostly holds": case([{"x": IDS}] * 2),
}


@pytest.mark.parametrize("rule", RULES, ids=[rule.reason for rule in RULES])
def test_every_rule_decides_a_list(rule: Rule) -> None:
    decided = DECIDED[rule.reason]
    assert rule_for(decided) is rule
    if rule.answer is None:
        with pytest.raises(SampleError, match="can be read in two ways"):
            has_samples(decided)
    else:
        assert has_samples(decided) == (rule.answer == "samples")


STATES = [(torch.zeros(4, 8), torch.zeros(4, 8)) for _ in range(6)]


@pytest.mark.parametrize(
    ("pair", "number", "size"),
    [
        ((torch.zeros(3, 16, 16), torch.zeros(16, 16)), 2, 2),  # images and masks
        ((torch.zeros(5), torch.zeros(1)), 3, 3),
        ((IMAGE, IMAGE), 8, 8),  # before and after
        ((torch.zeros(7, 5), 3), 6, 6),
    ],
)
@pytest.mark.parametrize("kind", [list, tuple])
def test_pairs_that_were_not_collated_are_samples(pair, number, size, kind) -> None:
    if kind is tuple:  # a few tuples in a tuple are fields
        number, size = 6, 6
    rows = rows_of(kind([pair] * number))
    assert rows.size == size and len(rows.cut(0, 2)) == 2


def test_lists_of_fields_and_of_states_are_no_samples() -> None:
    views = [torch.zeros(8, 5), torch.zeros(8, 5)]
    assert rows_of([views, views]).size == 8
    rows = rows_of({"x": torch.zeros(4, 5), "states": STATES})
    assert rows.size == 4 and len(rows.cut(0, 2)["states"]) == 6


def test_a_few_pairs_with_rows_of_their_own_ask_unless_batches_before_tell() -> None:
    def pairs(number: int) -> list[Any]:
        return [(torch.zeros(7 + i % 2, 5), torch.zeros(7 + i % 2)) for i in range(number)]

    with pytest.raises(SampleError, match='batch_dims="list" for the first, batch_dims=0'):
        rows_of(pairs(2))
    assert rows_of(pairs(2), batch_dims="list").size == 2
    assert rows_of(pairs(2), like=rows_of(pairs(8)).layout).size == 2
    same = [(torch.zeros(7, 5), torch.zeros(7))] * 2
    assert rows_of(same, batch_dims=0).size == 7


def test_labels_tell_that_a_tuple_of_images_is_one_of_samples() -> None:
    assert rows_of(((IMAGE,) * 8, tuple(range(8)))).size == 8
    with pytest.raises(SampleError, match="can be read in two ways"):
        rows_of(((IMAGE, IMAGE), (3, 7)))
