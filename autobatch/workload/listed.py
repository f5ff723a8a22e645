"""Lists in a batch: whether one has an entry for each sample, or for each field.

Invariant: the first of `RULES` that applies decides; where both readings are left it is an error
that shows them, never a guess.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

from autobatch.errors import SampleError
from autobatch.workload.flat_rows import counted
from autobatch.workload.layout import HANDFUL, dotted, is_named_index, shapes_of
from autobatch.workload.tree import Path, holds_tensor, is_array, leaves

__all__ = ["RULES", "Answer", "Case", "Listed", "Rule", "has_samples", "rule_for"]

Answer = Literal["samples", "fields"]

_OF_SAMPLES = re.compile(r"box|mask|label|area|keypoint|segment|image_id|polygon")
_OF_VIEWS = re.compile(r"input_ids|attention|token|pixel_values|embedding|position_ids")
_CHANNELS = (1, 3, 4)


class Listed:
    """A sequence of tensors or of mappings, which may be samples or fields."""

    def __init__(self, path: Path, node: Sequence[Any]) -> None:
        """Look at a sequence that `may_be` one."""
        self.path = path
        self.node = node
        self.inner = {
            (str(index), *rest): leaf
            for index, item in enumerate(node)
            for rest, leaf in leaves(item)
            if is_array(leaf)
        }

    @staticmethod
    def may_be(node: Any) -> bool:
        """Say whether a value holds only tensors, or only mappings, records or items with them."""
        if not isinstance(node, (list, tuple)) or hasattr(node, "_fields") or not node:
            return False
        if all(map(is_array, node)):
            return True
        if any(isinstance(item, (list, tuple)) or is_array(item) for item in node):
            return _are_items(node)
        if all(isinstance(item, Mapping) for item in node):
            return True
        return len(set(map(type, node))) == 1 and all(map(holds_tensor, node))

    @property
    def length(self) -> int:
        """Number of entries."""
        return len(self.node)

    @property
    def is_list(self) -> bool:
        """Whether it is a list and no tuple."""
        return isinstance(self.node, list)

    @property
    def of_tensors(self) -> bool:
        """Whether its entries are tensors."""
        return is_array(self.node[0])

    @property
    def of_items(self) -> bool:
        """Whether its entries are tuples or lists, as items of a data set are."""
        return isinstance(self.node[0], (list, tuple))

    @property
    def of_lists(self) -> bool:
        """Whether its entries are lists."""
        return isinstance(self.node[0], list)

    @property
    def of_numbers(self) -> bool:
        """Whether its entries are items with a number of their own, such as a label."""
        return self.of_items and all(map(_has_number, self.node))

    @cached_property
    def may_be_batches(self) -> bool:
        """Whether the tensors of each entry have rows in common, as the fields of a batch have."""
        if not self.of_items or self.of_numbers:
            return False
        rows: dict[str, set[int]] = {}
        for path, leaf in self.inner.items():
            rows.setdefault(path[0], set()).add(leaf.shape[0] if len(leaf.shape) else -1)
        return all(len(each) == 1 and -1 not in each for each in rows.values())

    @property
    def is_bare(self) -> bool:
        """Whether it is the whole batch, and its entries are tensors."""
        return self.of_tensors and not self.path

    @cached_property
    def rows(self) -> int | None:
        """The first dimension that all tensors have; None where they differ."""
        firsts = {leaf.shape[0] if len(leaf.shape) else None for leaf in self.inner.values()}
        return firsts.pop() if len(firsts) == 1 else None

    @property
    def are_of_kinds(self) -> bool:
        """Whether it is a tuple, or tensors differ in their number of dimensions or dtypes."""
        kinds = {(len(leaf.shape), leaf.dtype) for leaf in self.inner.values()}
        return not self.is_list or len(kinds) > 1

    @property
    def has_same_keys(self) -> bool:
        """Whether all entries that are mappings have the same keys."""
        keys = {tuple(map(str, item)) if isinstance(item, Mapping) else () for item in self.node}
        return len(keys) == 1

    @property
    def has_vectors(self) -> bool:
        """Whether it has nothing but vectors and numbers."""
        return max(len(leaf.shape) for leaf in self.inner.values()) < 2

    @property
    def has_images(self) -> bool:
        """Whether a tensor has the shape of one image."""
        return any(len(a.shape) == 3 and a.shape[0] in _CHANNELS for a in self.inner.values())

    @property
    def has_videos(self) -> bool:
        """Whether a tensor may hold several images."""
        return any(len(leaf.shape) > 3 for leaf in self.inner.values())

    @property
    def names_samples(self) -> bool:
        """Whether a name is one of what each sample has of its own, such as boxes."""
        return self._is_named(_OF_SAMPLES)

    @property
    def names_views(self) -> bool:
        """Whether a name is one of what is stacked for all samples, such as token ids."""
        return self._is_named(_OF_VIEWS)

    def _is_named(self, names: re.Pattern[str]) -> bool:
        return any(names.search(path[-1]) for path in self.inner if path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A list, and what the batch has beside it that tells whether its entries are samples.

    Attributes:
        seq: the list.
        stated: what `batch_dims` makes of it; None where it does not say.
        fields: the batch's tensors.
        lengths: of the batch's other lists, of its texts, and of long sequences without tensors.
        short: lengths of the other sequences without tensors, which may be sizes.
    """

    seq: Listed
    stated: Answer | None = None
    fields: Mapping[Path, Any] = field(default_factory=dict)
    lengths: set[int] = field(default_factory=set)
    short: set[int] = field(default_factory=set)

    @property
    def rows(self) -> set[int]:
        """First dimensions of the batch's tensors, without flat rows."""
        flat = {leaf.shape[0] for path, leaf in self.fields.items() if is_named_index(path)}
        return {leaf.shape[0] for leaf in self.fields.values()} - flat

    @property
    def by_rows(self) -> bool:
        """Whether the batch has tensors with its rows, which are not as many as its entries."""
        return self.seq.rows in self.rows and self.seq.rows != self.seq.length

    @property
    def by_length(self) -> bool:
        """Whether something in the batch has as many rows or entries as it has entries."""
        length = self.seq.length
        return length in self.rows | self.lengths or length in counted(self.fields)

    @property
    def by_twin(self) -> bool:
        """Whether another list has as many entries, while no tensor has its rows."""
        return self.seq.length in self.lengths and not self.by_rows

    @property
    def by_both(self) -> bool:
        """Whether the batch has its rows, and its length."""
        is_square = self.seq.rows == self.seq.length and self.seq.rows in self.rows
        return is_square or (self.by_rows and self.by_length)


class Rule(NamedTuple):
    """In which cases entries are samples or fields, and why; None where they may be either."""

    applies: Callable[[Case], bool]
    answer: Answer | None
    reason: str


RULES = (
    Rule(lambda c: c.stated == "samples", "samples", "batch_dims says so"),
    Rule(lambda c: c.stated == "fields", "fields", "batch_dims says where their samples are"),
    Rule(
        lambda c: c.seq.is_bare and c.seq.rows is None and c.seq.are_of_kinds,
        "fields",
        "samples are all of one kind",
    ),
    Rule(
        lambda c: c.seq.is_bare and c.seq.rows is None,
        None,
        "sequences of unequal length may be samples, or fields of one sample",
    ),
    Rule(
        lambda c: (
            c.seq.rows is None
            and (c.seq.may_be_batches or c.seq.of_lists)
            and c.seq.length <= HANDFUL
        ),
        None,
        "each entry may be a batch of its own, or a sample of its own length",
    ),
    Rule(lambda c: c.seq.rows is None, "samples", "fields have as many rows as each other"),
    Rule(
        lambda c: c.by_twin and c.seq.names_views and c.seq.rows in c.rows,
        "fields",
        "by chance another list is as long: views have the rows of the batch",
    ),
    Rule(lambda c: c.by_twin, "samples", "lists of equal length belong together"),
    Rule(
        lambda c: c.by_both and c.seq.names_samples and not c.seq.names_views,
        "samples",
        "each sample has boxes of its own",
    ),
    Rule(
        lambda c: c.by_both and c.seq.names_views and not c.seq.names_samples,
        "fields",
        "token ids are stacked",
    ),
    Rule(lambda c: c.by_both, None, "both its length and its rows are the batch's"),
    Rule(lambda c: c.by_length, "samples", "its length is the batch's"),
    Rule(lambda c: c.by_rows, "fields", "its rows are the batch's"),
    Rule(
        lambda c: c.seq.is_bare and c.seq.is_list and c.seq.has_images and c.seq.length > 1,
        None,
        "a list of images may be one of batches whose size is like a number of channels",
    ),
    Rule(
        lambda c: c.seq.of_tensors and c.seq.is_list and bool(c.seq.path),
        "samples",
        "a batch's fields are not in a list of their own",
    ),
    Rule(
        lambda c: c.seq.of_tensors and c.seq.length in c.short,
        None,
        "as many numbers beside it may be one of each sample, or a size",
    ),
    Rule(lambda c: c.seq.of_tensors, "fields", "collate functions give tuples of fields"),
    Rule(
        lambda c: c.seq.of_numbers and (c.seq.has_images or c.seq.length > HANDFUL),
        "samples",
        "an item has a label of its own",
    ),
    Rule(
        lambda c: (
            c.seq.may_be_batches
            and (bool(c.rows) or c.seq.of_lists or (bool(c.seq.path) and c.seq.length == 1))
        ),
        "fields",
        "default_collate makes lists of fields, and states are kept in tuples",
    ),
    Rule(
        lambda c: c.seq.of_items and (c.seq.has_videos or c.seq.length <= HANDFUL),
        None,
        "each entry may be a batch of its own, or a sample",
    ),
    Rule(lambda c: c.seq.of_items, "samples", "items that were not collated are tuples"),
    Rule(lambda c: not c.seq.has_same_keys, "fields", "samples have the same keys"),
    Rule(lambda c: c.seq.names_views, "fields", "a view is stacked"),
    Rule(
        lambda c: c.seq.names_samples or c.seq.has_images,
        "samples",
        "each sample has boxes, or one image",
    ),
    Rule(
        lambda c: c.seq.length > 1 and c.seq.has_vectors,
        None,
        "a vector may be one sample's, or a number for each",
    ),
    Rule(lambda c: True, "fields", "stacked rows are what a tensor mostly holds"),
)
"""The first that applies decides."""


def rule_for(case: Case) -> Rule:
    """Return the rule that decides a case."""
    return next(rule for rule in RULES if rule.applies(case))


def has_samples(case: Case) -> bool:
    """Say whether a list has an entry for each sample.

    Raises:
        SampleError: it may as well have one for each field.
    """
    answer, seq = rule_for(case).answer, case.seq
    if answer is not None:
        return answer == "samples"
    name = dotted(seq.path)
    rows = seq.rows if seq.rows is not None else "the first dimension of each"
    asked = f'{{{name!r}: "list"}}' if seq.path else '"list"'
    raise SampleError(
        f"the list {name} can be read in two ways, as {seq.length} samples, or as "
        f"{seq.length} fields with {rows} rows ({shapes_of(seq.inner)}): pass "
        f"batch_dims={asked} for the first, batch_dims={0 if not seq.path else {name: 0}} for the "
        "second"
    )


def _are_items(node: Any) -> bool:
    """Say whether a list may hold items that were not collated: tuples that are all alike.

    A tuple of more than a few may, too, and so may lists in a list.
    """
    kinds = set(map(type, node))
    if len(kinds) > 1 or not kinds <= {tuple, list}:
        return False
    if kinds == {tuple} and isinstance(node, list) and all(map(_has_number, node)):
        return True
    if isinstance(node, tuple) and (kinds == {list} or len(node) <= HANDFUL):
        return False
    made_of = [
        [(path, leaf.ndim, leaf.dtype) for path, leaf in leaves(item) if is_array(leaf)]
        for item in node
    ]
    return bool(made_of[0]) and all(each == made_of[0] for each in made_of)


def _has_number(item: Any) -> bool:
    """Say whether an item has a value of no rows."""
    return any(not part.ndim if is_array(part) else isinstance(part, (int, float)) for part in item)
