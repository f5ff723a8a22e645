"""Every card of the catalogue can be described, and is known by the name that its driver gives."""

from __future__ import annotations

import pytest

from autobatch.gpus.catalogue import CATALOGUE, find_gpu, find_installed
from tests.bench.cards import MODELS, described


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_card_is_known_by_its_drivers_name(name: str) -> None:
    spec = CATALOGUE[name]
    assert find_installed(MODELS[name].name, spec.capacity_bytes) is spec


@pytest.mark.parametrize("spec", [*CATALOGUE.values(), find_gpu("24GiB")], ids=lambda s: s.name)
def test_a_description_has_every_figure(spec) -> None:
    fields = dict(field.split("=") for field in described(spec, 80).split(","))
    assert int(fields["capacity"]) == spec.capacity_bytes
    assert all(
        value not in ("", "0") for key, value in fields.items() if key in "l2 threads shared"
    )
