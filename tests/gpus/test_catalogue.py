import pytest
from hypothesis import given
from hypothesis import strategies as st

from autobatch.errors import UnknownGpuError, UsageError
from autobatch.gpus.catalogue import CATALOGUE, GpuSpec, find_gpu, find_installed

GIB = 2**30

REQUIRED = {
    *("t4", "v100-16gb", "v100-32gb", "a10g", "l4", "l40s"),
    *("a100-40gb", "a100-80gb", "h100-80gb", "h200", "b200"),
    *("rtx-3060", "rtx-3090", "rtx-4060", "rtx-4090", "rtx-5090"),
    *("p100-16gb", "rtx-2080-ti", "rtx-3070", "rtx-3080-10gb", "rtx-3080-12gb", "rtx-4070"),
    *("rtx-4080", "rtx-5080", "rtx-3060-laptop", "rtx-4060-laptop", "a30", "a40", "l40"),
    *("h100-pcie", "h100-nvl", "gh200", "gb10"),
}


def test_the_catalogue_holds_the_cards_that_are_promised():
    assert set(CATALOGUE) >= REQUIRED


@pytest.mark.parametrize("spec", CATALOGUE.values(), ids=lambda spec: spec.name)
def test_every_figure_is_plausible_and_names_its_source(spec):
    assert CATALOGUE[spec.name] is spec
    assert spec.context_bytes < 0.05 * spec.capacity_bytes
    assert 2e11 < spec.bandwidth_bytes_per_s < 1e13
    assert set(spec.flops) <= {"fp32", "tf32", "fp16", "bf16"}
    assert spec.flops["fp32"] < spec.flops["fp16"]
    assert ("bf16" in spec.flops) == ("tf32" in spec.flops) == (spec.compute_capability >= (8, 0))
    assert 10 < spec.multiprocessors < 200
    figures = {"capacity_bytes", "compute_capability", "multiprocessors", "context_bytes", "flops"}
    assert set(spec.sources) == figures | {"bandwidth_bytes_per_s"}
    assert all(spec.sources.values())


@pytest.mark.parametrize(
    ("name", "gib_on_the_box"), [("t4", 16), ("a100-40gb", 40), ("h100-80gb", 80), ("b200", 180)]
)
def test_cuda_reports_less_than_the_box_says(name, gib_on_the_box):
    assert 0.9 * gib_on_the_box < CATALOGUE[name].capacity_bytes / GIB < gib_on_the_box


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("A100 40GB", "a100-40gb"),
        ("a100_40gb", "a100-40gb"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("Tesla V100-SXM2-32GB", "v100-32gb"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("H100", "h100-80gb"),
        ("rtx3090", "rtx-3090"),
        ("NVIDIA GeForce RTX 3090", "rtx-3090"),
        ("RTX 3060 12GB", "rtx-3060"),
        ("A6000", "rtx-a6000"),
        ("Tesla T4", "t4"),
        ("a10g", "a10g"),
        ("L40S 48GB", "l40s"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("Tesla V100-PCIE-16GB", "v100-16gb"),
        ("Tesla V100-SXM3-32GB", "v100-32gb"),
        ("Tesla V100-DGXS-32GB", "v100-32gb"),
        ("Tesla V100-FHHL-16GB", "v100-16gb"),
        ("Tesla P100-PCIE-16GB", "p100-16gb"),
        ("Tesla P100-SXM2-16GB", "p100-16gb"),
        ("p100", "p100-16gb"),
        ("GeForce RTX 2080 Ti", "rtx-2080-ti"),
        ("gtx2080ti", "rtx-2080-ti"),
        ("NVIDIA GeForce RTX 3060 Laptop GPU", "rtx-3060-laptop"),
        ("RTX 4060 mobile", "rtx-4060-laptop"),
        ("rtx 3080 12 GB", "rtx-3080-12gb"),
        ("NVIDIA GeForce RTX 5080", "rtx-5080"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 80GB HBM2e", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GB10", "gb10"),
        ("NVIDIA L40", "l40"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA A40", "a40"),
        ("NVIDIA RTX A6000", "rtx-a6000"),
    ],
)
def test_common_spellings_find_the_card(spelling, name):
    assert find_gpu(spelling).name == name


@given(st.sampled_from(sorted(CATALOGUE)), st.sampled_from("- _/"), st.booleans())
def test_every_catalogue_name_is_found_in_any_case_and_punctuation(name, separator, upper):
    spelling = name.replace("-", separator)
    assert find_gpu(spelling.upper() if upper else spelling) is CATALOGUE[name]


@pytest.mark.parametrize(
    ("name", "candidates"),
    [
        ("a100", "a100-40gb or a100-80gb"),
        ("V100", "v100-16gb or v100-32gb"),
        ("NVIDIA GeForce RTX 3080", "rtx-3080-10gb or rtx-3080-12gb"),
    ],
)
def test_a_name_of_several_cards_asks_which(name, candidates):
    with pytest.raises(UnknownGpuError, match=candidates):
        find_gpu(name)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("rtx 4060 ti", "rtx-4060"),
        ("RTX 3060 8GB", "rtx-3060"),
        ("rtx 4900", "rtx-4090"),
        ("4090ti", "rtx-4090"),
        ("4080 super", "rtx-4080"),
        ("NVIDIA GeForce RTX 4090 D", "rtx-4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "rtx-4060-laptop"),
        ("Tesla V100S-PCIE-32GB", "v100-16gb"),
        ("NVIDIA A100-SXM-64GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "a100-40gb"),
        ("NVIDIA H200 NVL", "h200"),
        ("NVIDIA GH200 144G HBM3e", "gh200"),
        ("H100 96GB HBM3", "h100-80gb"),
        ("24", "24GiB"),
    ],
)
def test_an_unknown_card_is_answered_with_the_nearest_names_and_a_way_out(name, nearest):
    with pytest.raises(UnknownGpuError) as caught:
        find_gpu(name)
    message = str(caught.value)
    assert f"did you mean {nearest}" in message
    assert 'gpu="24GiB"' in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "capacity_gib", "card"),
    [
        ("NVIDIA GeForce RTX 3080", 9.7, "rtx-3080-10gb"),
        ("NVIDIA GeForce RTX 3080", 11.7, "rtx-3080-12gb"),
        ("NVIDIA A100 80GB PCIe", 79.1, "a100-80gb"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 15.6, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 4.75, None),
    ],
)
def test_a_card_in_the_machine_is_found_by_its_name_and_size(name, capacity_gib, card):
    found = find_installed(name, int(capacity_gib * GIB))
    assert (found and found.name) == card


@pytest.mark.parametrize("name", ["", "mi300x", "3"])
def test_a_name_like_no_other_is_unknown_without_a_guess(name):
    with pytest.raises(UnknownGpuError, match="not in the catalogue: `autobatch gpus`"):
        find_gpu(name)


@pytest.mark.parametrize("text", ["24GiB", "24 GiB", "24gb", "24G", "24576MiB"])
def test_a_plain_size_is_a_card_of_that_capacity(text):
    spec = find_gpu(text)
    assert spec.name == text.replace(" ", "")
    assert spec.capacity_bytes == 24 * GIB
    assert spec.compute_capability == (8, 0)
    assert 0 < spec.context_bytes < GIB
    assert spec.bandwidth_bytes_per_s is None
    assert spec.flops == {}
    assert "assumed" in spec.sources["context_bytes"]


@pytest.mark.parametrize("text", ["0GiB", "100MiB"])
def test_a_size_without_room_for_a_context_is_a_usage_error(text):
    with pytest.raises(UsageError):
        find_gpu(text)


@pytest.mark.parametrize("capacity", [0, -1])
def test_a_capacity_that_is_not_positive_is_a_usage_error(capacity):
    with pytest.raises(UsageError, match=f"capacity of {capacity} bytes"):
        GpuSpec(name="mine", capacity_bytes=capacity)


@pytest.mark.parametrize("context", [-1, GIB, 2 * GIB])
def test_a_context_must_leave_some_of_the_capacity(context):
    with pytest.raises(UsageError, match="does not fit"):
        GpuSpec(name="mine", capacity_bytes=GIB, context_bytes=context)
