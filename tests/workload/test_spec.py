"""A SPEC becomes a model or a Workload, downloads nothing, and fails in one line."""

from __future__ import annotations

import json
import sys
import textwrap
import traceback

import pytest
import torch
from torch import nn

from autobatch.errors import AutobatchError, SampleError, SpecError, WorkloadError
from autobatch.support.installing import install_line
from autobatch.workload.spec.load import load_spec
from autobatch.workload.workload import Workload

USER_FILE = """
import torch
from torch import nn
from sibling import FEATURES
from autobatch.workload.workload import Workload

def build_model():
    from sibling import CLASSES
    return nn.Linear(FEATURES, CLASSES)

def build_workload():
    return Workload(model=build_model(), batch=lambda n: torch.zeros(n, FEATURES))

def build_number():
    return 3

def sized(width):
    return nn.Linear(width, 1)

def broken():
    raise KeyError("missing weights")

kept = nn.Linear(2, 2)
number = 3
"""


@pytest.fixture
def user_file(tmp_path):
    (tmp_path / "sibling.py").write_text("FEATURES = 6\nCLASSES = 3\n")
    path = tmp_path / "user_model.py"
    path.write_text(USER_FILE)
    yield path
    for name in ("sibling", "autobatch_spec_user_model"):
        sys.modules.pop(name, None)


def message(spec: str, error: type[AutobatchError] = SpecError) -> str:
    with pytest.raises(error) as caught:
        load_spec(spec)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_function_in_a_file_returns_a_model(user_file):
    model = load_spec(f"{user_file}:build_model")
    assert isinstance(model, nn.Linear) and model.out_features == 3


def test_a_function_in_a_file_returns_a_workload(user_file):
    assert isinstance(load_spec(f"{user_file}:build_workload"), Workload)


def test_a_model_kept_in_a_variable_will_do(user_file):
    assert isinstance(load_spec(f"{user_file}:kept"), nn.Linear)


def test_a_function_of_a_module_in_the_current_folder_is_found(user_file, monkeypatch):
    monkeypatch.chdir(user_file.parent)
    try:
        assert isinstance(load_spec("user_model:build_model"), nn.Linear)
    finally:
        del sys.modules["user_model"]


def test_the_folder_of_the_file_leaves_the_search_path_whatever_happens(user_file):
    before = list(sys.path)
    load_spec(f"{user_file}:build_model")
    message(f"{user_file}:broken", WorkloadError)
    assert sys.path == before


def test_a_file_that_reads_its_own_arguments_finds_none(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["autobatch", "probe", "--width", "x"])
    lines = """
        import argparse
        from torch import nn
        parser = argparse.ArgumentParser()
        parser.add_argument("--width", type=int, default=3)
        width = parser.parse_args().width
        build = lambda: nn.Linear(1, width)
    """
    (tmp_path / "own.py").write_text(textwrap.dedent(lines))
    assert load_spec(f"{tmp_path / 'own.py'}:build").out_features == 3
    assert sys.argv[1:] == ["probe", "--width", "x"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("build_modle", "did you mean build_model"),
        ("sized", "needs arguments (missing a required argument: 'width')"),
        ("build_number", "returned int"),
        ("number", "is a int"),
    ],
)
def test_a_function_that_will_not_do_is_named_with_the_reason(user_file, name, words):
    assert words in message(f"{user_file}:{name}")


@pytest.mark.parametrize("spec", ["resnet50", "", ":", "file.py:", ":function"])
def test_text_that_is_no_spec_gets_the_forms(spec):
    assert "package.module:function" in message(spec)


def test_options_after_a_function_say_who_takes_them(user_file):
    said = message(f"{user_file}:sized?width=128")
    assert said.startswith("options after ? are for timm, torchvision, hf: write ")
    assert said.endswith("user_model.py:sized, and let its defaults, or --vary, say width=128")


@pytest.mark.parametrize("spec", ["hf:", "hf: ", "hf:?seq=8", "timm:", "torchvision:"])
def test_an_empty_name_is_refused_before_anything_is_read(spec, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError, match=r"names no model: write (hf|timm|torchvision):NAME"):
        load_spec(spec)


def test_a_file_without_a_function_gets_those_that_it_has(user_file):
    with pytest.raises(SpecError, match=r"is no SPEC .did you mean .*user_model\.py:\w+"):
        load_spec(f"{user_file}:")


def test_a_missing_file_is_named_with_the_nearest_one(user_file):
    wrong = user_file.with_name("user_modle.py")
    assert f"no such file: {wrong} (did you mean {user_file}" in message(f"{wrong}:build_model")


def test_a_missing_module_is_named():
    assert "no module named 'no_such_module': write" in message("no_such_module:build")


def test_a_misspelt_library_and_a_file_without_its_ending_are_recognised(user_file, monkeypatch):
    assert "did you mean timm?" in message("tmm:resnet50")
    monkeypatch.chdir(user_file.parent)
    (user_file.parent / "nets").mkdir()
    (user_file.parent / "nets" / "one.py").touch()
    assert "did you mean nets/one.py?" in message("nets/one:build")


def test_a_user_file_that_raises_keeps_its_own_traceback(tmp_path):
    path = tmp_path / "raises.py"
    path.write_text("import nothing_of_this_name\n")
    with pytest.raises(WorkloadError, match="nothing_of_this_name") as caught:
        load_spec(f"{path}:build")
    cause = caught.value.__cause__
    assert isinstance(cause, ModuleNotFoundError)
    assert any(frame.filename == str(path) for frame in traceback.extract_tb(cause.__traceback__))
    assert "autobatch_spec_raises" not in sys.modules


def test_a_function_that_raises_keeps_its_error(user_file):
    assert "KeyError: 'missing weights'" in message(f"{user_file}:broken", WorkloadError)


def test_a_library_that_is_not_installed_is_named_with_the_command(monkeypatch):
    for name in ("timm", "torchvision", "transformers"):
        monkeypatch.delitem(sys.modules, name, raising=False)

    class Absent:
        def find_spec(self, name, path=None, target=None):
            if name in ("timm", "torchvision", "transformers"):
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    for prefix, extra in (
        ("timm", "timm"),
        ("torchvision", "timm"),
        ("hf", "hf"),
    ):
        assert install_line(extra) in message(f"{prefix}:any")


SMALL = "n_layer=1&n_embd=16&n_head=2"


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers")


def test_a_model_type_is_built_on_meta_with_its_options_and_inputs(transformers):
    workload = load_spec(f"hf:gpt2?seq=24&{SMALL}")
    assert type(workload.model).__name__ == "GPT2LMHeadModel"
    assert {parameter.device.type for parameter in workload.model.parameters()} == {"meta"}
    assert {parameter.dtype for parameter in workload.model.parameters()} == {torch.float32}
    assert workload.batch(3)["input_ids"].shape == (3, 24)


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("bert?num_hidden_layers=1", "BertForMaskedLM"),
        ("bert?num_hidden_layers=1&is_decoder=true", "BertLMHeadModel"),
        ("bert?num_hidden_layers=1&head=sequence-classification", "BertForSequenceClassification"),
        ("t5?num_layers=1", "T5ForConditionalGeneration"),
        ("vit?num_hidden_layers=1", "ViTForImageClassification"),
        ("whisper?encoder_layers=1&decoder_layers=1", "WhisperForConditionalGeneration"),
        ("llama?num_hidden_layers=80&hidden_size=8192", "LlamaForCausalLM"),
        ("mixtral", "MixtralForCausalLM"),
        ("clip", "CLIPModel"),
        ("gpt2?head=base", "GPT2Model"),
    ],
)
def test_a_model_type_is_built_with_its_usual_head_or_the_one_asked_for(transformers, spec, name):
    assert type(load_spec(f"hf:{spec}").model).__name__ == name


def test_the_dtype_of_the_parameters_can_be_chosen(transformers):
    model = load_spec(f"hf:gpt2?dtype=bf16&{SMALL}").model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_local_config_is_read_from_its_folder_or_file(transformers, tmp_path):
    stated = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 32}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    for place in (tmp_path, tmp_path / "config.json"):
        workload = load_spec(f"hf:{place}?vocab_size=99")
        assert workload.batch(2)["labels"].shape == (2, 32)
        assert workload.model.config.vocab_size == 99


def test_a_folder_without_a_config_does_not_hide_a_model_type(transformers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()  # a project, or a report of that name
    assert type(load_spec("hf:gpt2?n_layer=1").model).__name__ == "GPT2LMHeadModel"
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "bert", "hidden_size": 24}')
    assert type(load_spec("hf:gpt2?num_hidden_layers=1").model).__name__ == "BertForMaskedLM"


def test_a_request_to_the_hub_fails_while_a_model_is_built(transformers, monkeypatch):
    import huggingface_hub

    seen = []

    def from_config(*_, **__):
        seen.append(huggingface_hub.constants.HF_HUB_OFFLINE)
        raise ValueError("stop here")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_config", from_config)
    message("hf:gpt2")
    assert seen == [True] and huggingface_hub.constants.HF_HUB_OFFLINE is False


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("gpt2x", "did you mean gpt2"),
        ("GPT2", "did you mean gpt2"),
        ("someone/model-7b", "nothing is downloaded"),
        ("gpt2?n_layers=3", "did you mean n_layer"),
        ("gpt2?n_layer=many", "cannot be built with n_layer=many"),
        ("gpt2?head=masked-lm", "use one of causal-lm"),
        ("gpt2?seq=0", "seq=0 is not a size"),
        ("gpt2?seq", "not key=value"),
        ("gpt2?dtype=int8", "use fp32, bf16, fp16"),
    ],
)
def test_a_model_type_or_option_that_is_unknown_is_named(transformers, spec, words):
    assert words in message(f"hf:{spec}")


def test_a_folder_without_a_usable_config_is_named(transformers, tmp_path):
    assert "config.json cannot be read" in message(f"hf:{tmp_path}")
    (tmp_path / "config.json").write_text("[]")
    assert "has no model_type" in message(f"hf:{tmp_path}")


def test_a_sequence_too_long_for_the_model_is_refused(transformers):
    assert "1024 positions" in message(f"hf:gpt2?seq=1025&{SMALL}", SampleError)


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        ("resnet18", (2, 3, 224, 224)),
        ("resnet18.a1_in1k?img_size=96&num_classes=10", (2, 3, 96, 96)),
        ("vit_tiny_patch16_224?img_size=96&in_chans=1", (2, 1, 96, 96)),
    ],
)
def test_a_timm_model_is_built_on_meta_for_the_size_of_image_asked_for(spec, shape):
    pytest.importorskip("timm")
    workload = load_spec(f"timm:{spec}")
    assert {parameter.device.type for parameter in workload.model.parameters()} == {"meta"}
    assert workload.batch(2)[0].shape == shape


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("resnet5000", "did you mean resnet50"),
        ("hf-hub:timm/resnet50", "timm has no model"),
        ("resnet18?pretrained=true", "nothing is downloaded"),
        ("resnet18?foo=1", "cannot be built with foo=1"),
    ],
)
def test_a_timm_model_or_option_that_is_unknown_is_named(spec, words):
    pytest.importorskip("timm")
    assert words in message(f"timm:{spec}")


@pytest.mark.parametrize("name", ["resnet18", "googlenet", "fcn_resnet50"])
def test_a_torchvision_model_is_built_on_meta_without_any_weights(name, monkeypatch):
    pytest.importorskip("torchvision")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", None)
    workload = load_spec(f"torchvision:{name}")
    assert {parameter.device.type for parameter in workload.model.parameters()} == {"meta"}
    assert workload.loss is not None


def test_an_unknown_torchvision_model_is_named_with_the_nearest_one():
    pytest.importorskip("torchvision")
    assert "did you mean resnet50" in message("torchvision:resnet51")
