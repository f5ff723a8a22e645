"""What the builder writes and reads, without compiling anything."""

from __future__ import annotations

import pytest

from tests.bench.card import _code_version
from tests.bench.stubs import error_table, refusals, stubs, text_of

HEADER = """
/* A comment with fooCreate(void); in it. */
typedef struct fooContext *fooHandle_t;
typedef enum { FOO_OK = 0, FOO_BROKEN = 7 } fooStatus_t;
#define FOO_API extern
FOO_API fooStatus_t fooCreate(fooHandle_t *handle); // makes one
fooStatus_t fooGetWorkspaceSize(fooHandle_t handle, const int *shape, size_t *bytes);
const char *fooGetErrorString(fooStatus_t status);
fooStatus_t fooScale(fooHandle_t handle, double factor, float values[]);
enum fooError { FOO_SUCCESS = 0, FOO_NO_MEMORY = 2 };
"""


@pytest.fixture
def text(tmp_path) -> str:
    path = tmp_path / "foo.h"
    path.write_text(HEADER)
    return text_of([path])


def body(name: str, text: str) -> str:
    [line] = [
        line
        for line in stubs([name], text).splitlines()
        if f" *{name}(" in line or f" {name}(" in line
    ]
    return line


def test_a_stub_hands_out_handles_sizes_and_texts(text: str) -> None:
    assert "*(void **)p0 = calloc(1, 1024)" in body("fooCreate", text)
    sized = body("fooGetWorkspaceSize", text)
    assert "*(size_t *)p2 = 0" in sized and "p1) *" not in sized  # const is only read
    assert 'return "simulated"' in body("fooGetErrorString", text)
    assert "double p1, void *p2" in body("fooScale", text)


def test_what_no_public_header_declares_has_no_answer(text: str) -> None:
    assert body("fooUnknown", text) == 'void fooUnknown(void) { card_not_public("fooUnknown"); }'


def test_what_the_runtime_does_not_simulate_is_not_supported() -> None:
    code = refusals(["cudaSomething"])
    assert "REFUSE(cudaSomething)" in code and "return 801" in code


def test_errors_have_their_names(text: str) -> None:
    assert '{2, "FOO_NO_MEMORY"}' in error_table(text, "fooError", "names")


@pytest.mark.parametrize(
    ("capability", "version"), [((8, 9), 86), ((8, 0), 80), ((9, 0), 90), ((12, 1), 120)]
)
def test_a_card_runs_the_newest_code_of_its_generation(capability, version) -> None:
    from autobatch.gpus.catalogue import GpuSpec

    spec = GpuSpec(name="card", capacity_bytes=2**34, compute_capability=capability)
    assert _code_version(spec, "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120") == version
