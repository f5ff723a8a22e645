from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from autobatch.gpus.nvml import (
    Occupancy,
    OtherProcess,
    driver_version,
    installed_gpus,
    occupancy,
)

UUID = "3f2a6d6e-0000-1111-2222-333344445555"
PCI = "00000000:3B:00.0"
PID = 4242
NOT_AVAILABLE = 2**64 - 1


class NVMLError(Exception):
    pass


class NVMLLibraryMismatchError(Exception):  # no NVMLError, in pynvml neither
    pass


def listed(pid: int, used: int | None) -> SimpleNamespace:
    return SimpleNamespace(pid=pid, usedGpuMemory=used)


class FakeNvml:
    """One card in one driver; every attribute that is asked for is remembered."""

    def __init__(self, **answers: Any) -> None:
        self.asked: list[str] = []
        self.uuid = f"GPU-{UUID}"
        self.balance = 0
        self.answers: dict[str, Any] = {
            "nvmlDeviceGetCount": 1,
            "nvmlDeviceGetHandleByIndex": "by index",
            "nvmlDeviceGetHandleByUUID": self.by_uuid,
            "nvmlDeviceGetHandleByPciBusId": "by address",
            "nvmlDeviceGetName": b"NVIDIA Test",
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=1000, used=600),
            "nvmlDeviceGetMigMode": NVMLError("not supported"),
            "nvmlDeviceGetComputeRunningProcesses": [listed(PID, 300), listed(7, 200)],
            "nvmlDeviceGetGraphicsRunningProcesses": [],
            "nvmlSystemGetDriverVersion": "580.82.07",
            "nvmlInit": None,
            "nvmlShutdown": None,
        } | answers

    def by_uuid(self, uuid: str) -> str:
        if uuid != self.uuid:
            raise NVMLError("not found")
        return uuid

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the import system looks for a spec
            raise AttributeError(name)
        self.asked.append(name)
        if name.startswith("NVML"):
            return {"NVMLError": NVMLError}.get(name, NVMLLibraryMismatchError)

        def call(*arguments: Any) -> Any:
            answer = self.answers[name]
            if isinstance(answer, Exception):
                raise answer
            self.balance += {"nvmlInit": 1, "nvmlShutdown": -1}.get(name, 0)
            return answer(*arguments) if callable(answer) else answer

        return call


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeNvml]:
    def install(**answers: Any) -> FakeNvml:
        fake = FakeNvml(**answers)
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        return fake

    return install


Install = Callable[..., FakeNvml]


def look() -> Occupancy:
    found = occupancy(UUID, PCI, PID)
    assert found is not None
    return found


def test_own_memory_is_told_from_that_of_others(install: Install) -> None:
    install()
    assert look() == Occupancy(
        total_bytes=1000,
        used_bytes=600,
        own_bytes=300,
        other_processes=(OtherProcess(pid=7, used_bytes=200),),
    )


@pytest.mark.parametrize("prefix", ["", "GPU-", "MIG-"])
def test_a_uuid_is_found_with_and_without_its_prefix(prefix: str, install: Install) -> None:
    seen: list[str] = []
    memory = SimpleNamespace(total=1000, used=600)
    fake = install(nvmlDeviceGetMemoryInfo=lambda handle: seen.append(handle) or memory)
    fake.uuid = prefix + UUID
    look()
    assert occupancy(fake.uuid, PCI, PID) is not None
    assert seen == [fake.uuid, fake.uuid]


def test_an_unknown_uuid_falls_back_to_the_address_and_never_to_an_index(install: Install) -> None:
    fake = install(nvmlDeviceGetHandleByUUID=NVMLError("not found"))
    assert look().own_bytes == 300
    assert "nvmlDeviceGetHandleByPciBusId" in fake.asked
    assert "nvmlDeviceGetHandleByIndex" not in fake.asked


def test_a_card_that_is_not_there_is_none(install: Install) -> None:
    missing = NVMLError("not found")
    install(nvmlDeviceGetHandleByUUID=missing, nvmlDeviceGetHandleByPciBusId=missing)
    assert occupancy(UUID, PCI, PID) is None


@pytest.mark.parametrize("found_by", ["uuid", "address"])
def test_a_card_in_mig_mode_does_not_stand_for_one_of_its_instances(
    found_by: str, install: Install
) -> None:
    fake = install(nvmlDeviceGetMigMode=[1, 1])
    fake.uuid = f"GPU-{UUID}" if found_by == "uuid" else "another"
    assert occupancy(UUID, PCI, PID) is None
    fake.uuid = f"MIG-{UUID}"
    assert look().own_bytes == 300


def test_a_card_that_could_be_in_mig_mode_but_is_not_counts(install: Install) -> None:
    install(nvmlDeviceGetMigMode=[0, 1])
    assert look().own_bytes == 300


@pytest.mark.parametrize(
    "processes",
    [[], [listed(99, 300)], [listed(PID, 0)], NVMLError("not supported")],
    ids=["hidden", "ids of another namespace", "amounts of nothing", "not supported"],
)
def test_where_ids_are_hidden_nobody_is_told_apart(processes: Any, install: Install) -> None:
    fake = install(nvmlDeviceGetComputeRunningProcesses=processes)
    assert (look().own_bytes, look().other_processes) == (None, None)
    assert (look().total_bytes, look().used_bytes) == (1000, 600)
    assert fake.balance == 0


def test_drivers_older_than_the_bindings_hide_processes(install: Install) -> None:
    mismatch = NVMLLibraryMismatchError("unversioned function called")
    install(
        nvmlDeviceGetComputeRunningProcesses=mismatch,
        nvmlDeviceGetGraphicsRunningProcesses=mismatch,
    )
    assert (look().own_bytes, look().other_processes) == (None, None)


@pytest.mark.parametrize("hidden", [None, NOT_AVAILABLE])
def test_hidden_amounts_are_none_and_ids_are_kept(hidden: int | None, install: Install) -> None:
    install(nvmlDeviceGetComputeRunningProcesses=[listed(PID, hidden), listed(7, hidden)])
    assert look().own_bytes is None
    assert look().other_processes == (OtherProcess(pid=7, used_bytes=None),)


@pytest.mark.parametrize("drawn", [300, None])
def test_a_process_that_computes_and_draws_counts_once(drawn: int | None, install: Install) -> None:
    install(nvmlDeviceGetGraphicsRunningProcesses=[listed(PID, drawn), listed(8, 50)])
    assert look().own_bytes == 300
    assert look().other_processes == (
        OtherProcess(pid=7, used_bytes=200),
        OtherProcess(pid=8, used_bytes=50),
    )


def test_a_card_without_graphics_still_lists_what_computes(install: Install) -> None:
    install(nvmlDeviceGetGraphicsRunningProcesses=NVMLError("not supported"))
    assert look().own_bytes == 300
    assert look().other_processes == (OtherProcess(pid=7, used_bytes=200),)


@pytest.mark.parametrize(
    "refusing", ["nvmlDeviceGetMemoryInfo", "nvmlDeviceGetName", "nvmlDeviceGetHandleByIndex"]
)
def test_a_card_that_the_driver_does_not_describe_hides_no_other(
    refusing: str, install: Install
) -> None:
    def second_refuses(index: int) -> Any:
        if index:
            raise NVMLError("not supported")
        return usual(index) if callable(usual) else usual

    usual = FakeNvml().answers[refusing]
    by_index = {"nvmlDeviceGetHandleByIndex": lambda index: index}
    install(**{"nvmlDeviceGetCount": 2, **by_index, refusing: second_refuses})
    first, second = installed_gpus()
    assert (first.name, first.total_bytes, first.used_bytes) == ("NVIDIA Test", 1000, 600)
    sized = refusing == "nvmlDeviceGetName"
    assert (second.index, second.total_bytes) == (1, 1000 if sized else None)
    assert second.name == ("NVIDIA Test" if refusing == "nvmlDeviceGetMemoryInfo" else None)


@pytest.mark.parametrize("memory", [NVMLError("not supported"), SimpleNamespace(total=0, used=0)])
def test_processes_are_told_also_where_the_memory_is_not(memory: Any, install: Install) -> None:
    install(nvmlDeviceGetMemoryInfo=memory)
    found = look()
    assert (found.total_bytes, found.used_bytes, found.own_bytes) == (None, None, 300)


def test_the_driver_says_its_version(install: Install) -> None:
    install()
    assert driver_version() == "580.82.07"
    install(nvmlSystemGetDriverVersion=b"580.82.07")
    assert driver_version() == "580.82.07"
    install(nvmlSystemGetDriverVersion=NVMLError())
    assert driver_version() is None


def test_installed_gpus_are_listed_by_index(install: Install) -> None:
    install()
    (card,) = installed_gpus()
    assert (card.index, card.name) == (0, "NVIDIA Test")
    assert (card.total_bytes, card.used_bytes) == (1000, 600)


def test_no_bindings_or_no_driver_is_no_error(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = install(nvmlInit=NVMLError("driver not loaded"))
    assert (installed_gpus(), occupancy(UUID, PCI, PID), driver_version()) == ((), None, None)
    assert "nvmlShutdown" not in fake.asked
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert (installed_gpus(), occupancy(UUID, PCI, PID), driver_version()) == ((), None, None)


@pytest.mark.parametrize(
    "failing",
    [
        "nvmlDeviceGetCount",
        "nvmlDeviceGetHandleByIndex",
        "nvmlDeviceGetHandleByUUID",
        "nvmlDeviceGetHandleByPciBusId",
        "nvmlDeviceGetName",
        "nvmlDeviceGetMemoryInfo",
        "nvmlDeviceGetComputeRunningProcesses",
        "nvmlDeviceGetGraphicsRunningProcesses",
        "nvmlSystemGetDriverVersion",
        "nvmlShutdown",
    ],
)
def test_no_failing_call_raises_and_every_init_has_its_shutdown(
    failing: str, install: Install
) -> None:
    fake = install(**{failing: NVMLError("failed")})
    installed_gpus()
    occupancy(UUID, PCI, PID)
    occupancy("unknown", PCI, PID)
    driver_version()
    assert fake.asked.count("nvmlInit") == fake.asked.count("nvmlShutdown") == 4
    assert fake.balance == (4 if failing == "nvmlShutdown" else 0)


def test_nvml_is_only_ever_read(install: Install) -> None:
    fake = install()
    installed_gpus()
    occupancy(UUID, PCI, PID)
    occupancy("unknown", PCI, PID)
    driver_version()
    allowed = ("nvmlDeviceGet", "nvmlSystemGet", "nvmlInit", "nvmlShutdown", "NVML")
    assert [name for name in fake.asked if not name.startswith(allowed)] == []


def test_the_bindings_have_every_name_that_is_used(install: Install) -> None:
    fake = install()
    installed_gpus()
    occupancy("unknown", PCI, PID)
    driver_version()
    del sys.modules["pynvml"]
    pynvml = pytest.importorskip("pynvml")
    assert [name for name in fake.asked if not hasattr(pynvml, name)] == []
    assert not issubclass(pynvml.NVMLLibraryMismatchError, pynvml.NVMLError)
    assert pynvml.NVML_VALUE_NOT_AVAILABLE_ulonglong.value == NOT_AVAILABLE
