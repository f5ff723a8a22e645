"""All cases by name."""

from __future__ import annotations

from collections.abc import Mapping

from reports.equivalence.cases import Case
from reports.equivalence.losses import LOSSES
from reports.equivalence.models import MODELS

CASES: Mapping[str, Case] = {case.name: case for case in (*MODELS, *LOSSES)}
