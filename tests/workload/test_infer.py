"""Inputs come from what a model says about itself; guesses are tried on a fake copy first."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from autobatch.errors import SampleError
from autobatch.workload.infer.infer import infer


class LeNet(nn.Module):
    """Takes images of one size only, because of the Linear after the flattened features."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 4, 3, padding=1)
        self.fc = nn.Linear(4 * (side // 2) ** 2, 10)

    def forward(self, images):
        return self.fc(F.max_pool2d(self.convolution(images), 2).flatten(1))


class TinyLanguageModel(nn.Module):
    def __init__(self, positions: int = 32) -> None:
        super().__init__()
        self.wte = nn.Embedding(50, 16)
        self.wpe = nn.Embedding(positions, 16)
        self.head = nn.Linear(16, 50)

    def forward(self, ids, targets=None):
        return self.head(self.wte(ids) + self.wpe(torch.arange(ids.shape[1])))


class Sequences(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


def images_to_classes(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


@pytest.mark.parametrize(
    ("model", "shape", "dtype"),
    [
        (nn.Sequential(nn.Linear(20, 5), nn.Linear(5, 2)), (4, 20), torch.float32),
        (nn.Linear(20, 5, dtype=torch.bfloat16), (4, 20), torch.bfloat16),
        (images_to_classes(nn.Conv2d(3, 8, 3)), (4, 3, 224, 224), torch.float32),
        (images_to_classes(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3)), (4, 3, 224, 224), torch.float32),
        (LeNet(28), (4, 1, 28, 28), torch.float32),
        (LeNet(32), (4, 1, 32, 32), torch.float32),
        (LeNet(8), (4, 1, 8, 8), torch.float32),
        (nn.Conv1d(2, 4, 3), (4, 2, 1024), torch.float32),
        (nn.Conv3d(2, 4, 3), (4, 2, 16, 112, 112), torch.float32),
        (Sequences(nn.LSTM(6, 8, batch_first=True)), (4, 128, 6), torch.float32),
        (Sequences(nn.GRU(6, 8)), (128, 4, 6), torch.float32),
        (nn.TransformerEncoderLayer(16, 2, batch_first=True), (4, 128, 16), torch.float32),
        (nn.TransformerEncoderLayer(16, 2), (128, 4, 16), torch.float32),
        (nn.LayerNorm(9), (4, 9), torch.float32),
        (TinyLanguageModel(), (4, 32), torch.int64),
    ],
)
def test_a_plain_model_takes_what_its_first_layer_takes(model, shape, dtype):
    batch = infer(model).batch(4)
    assert batch.shape == shape and batch.dtype is dtype


def test_token_ids_lie_inside_the_vocabulary_and_differ():
    ids = infer(TinyLanguageModel()).batch(64)
    assert int(ids.min()) >= 0 and int(ids.max()) < 50 and len(ids.unique()) > 25


@settings(deadline=None, max_examples=15)
@given(features=st.integers(1, 64), n=st.integers(1, 16))
def test_an_inferred_batch_runs_for_real_at_any_size(features, n):
    model = nn.Sequential(nn.Linear(features, 3))
    assert model(infer(model).batch(n)).shape == (n, 3)


def test_an_inferred_batch_of_a_billion_samples_costs_nothing_inside_a_fake_mode():
    inferred = infer(TinyLanguageModel())
    with FakeTensorMode():
        batch = inferred.batch(10**9)
    assert isinstance(batch, FakeTensor) and batch.shape == (10**9, 32)


def test_inferring_changes_neither_the_model_nor_the_random_state():
    model = images_to_classes(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
    before = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    infer(model).batch(2)
    assert torch.equal(torch.get_rng_state(), random_state) and not model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) and not isinstance(value, FakeTensor)


def test_a_model_on_meta_is_never_materialised():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(10**6, 10**6), nn.Linear(10**6, 10**6))
    assert infer(model).batch(2).shape == (2, 10**6)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_compiled_and_parallel_wrappers_are_looked_through():
    model = nn.Linear(20, 5)
    assert infer(torch.compile(model)).batch(2).shape == (2, 20)
    assert infer(nn.DataParallel(model)).batch(2).shape == (2, 20)


def test_a_wrong_size_that_only_mixes_the_samples_is_not_taken():
    class Mixes(LeNet):
        def forward(self, images):
            pooled = F.max_pool2d(self.convolution(images), 2)
            return self.fc(pooled.view(-1, self.fc.in_features))

    # At 224 pixels every image would silently become 64 samples of 28 pixels.
    assert infer(Mixes(28)).batch(3).shape == (3, 1, 28, 28)


class TwoInputs(nn.Linear):
    def forward(self, left, right):
        return super().forward(left) + right


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (TwoInputs(3, 3), "forward takes left, right"),
        (nn.ReLU(), "no layer tells"),
        (nn.LazyLinear(3), "lazy"),
        (nn.Sequential(nn.Linear(4, 8), nn.Linear(9, 2)), "raises RuntimeError"),
    ],
)
def test_a_model_that_tells_nothing_is_an_error_that_shows_the_missing_argument(model, why):
    with pytest.raises(SampleError, match="sample=") as caught:
        infer(model)
    assert why in str(caught.value) and "\n" not in str(caught.value)


class Trainee(nn.Module):
    """Looks like a Lightning module."""

    def __init__(self, example) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.example_input_array = example

    def forward(self, x):
        return self.layer(x)

    def training_step(self, batch, batch_index):
        x, y = batch
        return {"loss": F.cross_entropy(self(x), y)}


def test_an_example_that_is_a_whole_batch_trains_by_the_training_step():
    model = Trainee((torch.rand(4, 6), torch.zeros(4, dtype=torch.int64)))
    inferred = infer(model)
    assert inferred.loss is not None
    loss = inferred.loss(model, inferred.batch(9))
    assert loss.shape == () and loss.requires_grad


def test_an_example_that_holds_the_inputs_alone_leaves_the_loss_open():
    inferred = infer(Trainee(torch.rand(4, 6)))
    assert inferred.loss is None and "loss=" in inferred.loss_note
    assert inferred.batch(9).shape == (9, 6)


def test_a_model_with_a_config_and_dummy_inputs_is_fed_with_them():
    model = nn.Linear(6, 3)
    model.config = SimpleNamespace()
    model.dummy_inputs = {"input": torch.rand(2, 6)}
    assert infer(model).batch(5)["input"].shape == (5, 6)


def small(model_type: str, auto: str, **config):
    transformers = pytest.importorskip("transformers")
    sizes = transformers.AutoConfig.for_model(model_type, **config)
    with torch.device("meta"):
        return getattr(transformers, auto).from_config(sizes)


TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 60}


def test_a_causal_language_model_gets_tokens_and_labels_as_long_as_its_positions():
    model = small("gpt2", "AutoModelForCausalLM", n_embd=16, n_layer=1, n_head=2, n_positions=64)
    inferred = infer(model)
    batch = inferred.batch(3)
    assert {key: tuple(leaf.shape) for key, leaf in batch.items()} == dict.fromkeys(
        ("input_ids", "labels"), (3, 64)
    )
    assert "output.loss" in inferred.loss_note
    assert infer(model, seq=16).batch(3)["labels"].shape == (3, 16)


def test_a_sequence_longer_than_a_table_of_positions_is_refused():
    model = small("gpt2", "AutoModelForCausalLM", n_embd=16, n_layer=1, n_head=2, n_positions=64)
    with pytest.raises(SampleError, match=r"seq=65 is longer than the 64 positions"):
        infer(model, seq=65)


def test_positions_that_skip_the_padding_index_are_not_used():
    model = small("roberta", "AutoModelForMaskedLM", max_position_embeddings=66, **TINY)
    assert infer(model).batch(2)["input_ids"].shape == (2, 64)


@pytest.mark.parametrize(
    ("auto", "labels"),
    [
        ("AutoModelForMaskedLM", {"labels": (2, 8)}),
        ("AutoModelForPreTraining", {"labels": (2, 8), "next_sentence_label": (2,)}),
        ("AutoModelForSequenceClassification", {"labels": (2,)}),
        ("AutoModelForTokenClassification", {"labels": (2, 8)}),
        ("AutoModelForQuestionAnswering", {"start_positions": (2,), "end_positions": (2,)}),
        ("AutoModelForMultipleChoice", {"labels": (2,)}),
        ("AutoModel", {}),
    ],
)
def test_every_head_of_an_encoder_gets_its_own_labels(auto, labels):
    model = small("bert", auto, intermediate_size=16, **TINY)
    shapes = {key: tuple(leaf.shape) for key, leaf in infer(model, seq=8).batch(2).items()}
    del shapes["input_ids"]
    assert shapes == labels


@pytest.mark.parametrize(
    ("model_type", "auto", "config"),
    [
        ("t5", "AutoModelForSeq2SeqLM", {"d_model": 16, "d_ff": 16, "num_layers": 1}),
        (
            "vit",
            "AutoModelForImageClassification",
            {"hidden_size": 24, "num_hidden_layers": 1, "image_size": 32, "num_labels": 7},
        ),
        (
            "whisper",
            "AutoModelForSpeechSeq2Seq",
            {
                "d_model": 12,
                "encoder_layers": 1,
                "decoder_layers": 1,
                "max_source_positions": 20,
            },
        ),
    ],
)
def test_models_of_transformers_give_a_loss_on_their_inferred_batch(model_type, auto, config):
    model = small(model_type, auto, **config)
    model = model.to_empty(device="cpu")
    output = model(**infer(model).batch(2))
    assert output.loss.shape == () and output.loss.requires_grad


class Config(SimpleNamespace):
    """As much of a transformers config as is read."""

    def to_dict(self):
        return vars(self)


SIZES = {"vocab_size": 50, "hidden_size": 8, "max_position_embeddings": 16, "image_size": 12}


def model_of(forward, main="input_ids", name="SomeModel", **config):
    """Make a module that looks like one of transformers."""
    made = type(name, (nn.Linear,), {"forward": forward, "main_input_name": main})(8, 8)
    made.config = Config(**(SIZES | config))
    return made


def shapes_of(model, n=3):
    return {key: tuple(leaf.shape) for key, leaf in infer(model).batch(n).items()}


def test_a_main_input_that_forward_does_not_take_gives_way_to_one_that_it_does():
    model = model_of(lambda self, pixel_values: pixel_values)
    assert shapes_of(model) == {"pixel_values": (3, 3, 12, 12)}


def test_required_arguments_are_made_by_their_names():
    def forward(self, input_ids, encoder_hidden_states, attention_mask, token_type_ids, bbox):
        assert encoder_hidden_states.shape == (*input_ids.shape, 8)
        return encoder_hidden_states * attention_mask[..., None]

    shapes = shapes_of(model_of(forward))
    assert shapes["encoder_hidden_states"] == (3, 16, 8) and shapes["bbox"] == (3, 16, 4)
    assert shapes["attention_mask"] == shapes["token_type_ids"] == (3, 16)


def test_what_an_error_asks_for_is_given_the_first_of_several_alone():
    def forward(self, pixel_values=None, input_ids=None, inputs_embeds=None, attention_mask=None):
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You have to specify either input_ids or inputs_embeds")
        if attention_mask is None:
            raise ValueError("`attention_mask` is needed")
        return pixel_values

    shapes = shapes_of(model_of(forward, main="pixel_values"))
    assert set(shapes) == {"pixel_values", "input_ids", "attention_mask"}


def test_where_something_is_none_the_other_inputs_are_given_then_their_masks():
    def forward(self, input_ids=None, pixel_values=None, pixel_mask=None, labels=None):
        return input_ids.float().mean() * pixel_values.mean() * pixel_mask.sum()

    assert shapes_of(model_of(forward)) == {
        "input_ids": (3, 16),
        "pixel_values": (3, 3, 12, 12),
        "pixel_mask": (3, 12, 12),
    }


def test_patches_in_one_row_agree_with_their_grid_whose_numbers_a_model_may_read():
    def forward(self, hidden_states, grid_thw):
        assert hidden_states.shape[1] == 3 * 2 * 4 * 4
        images = hidden_states.split(grid_thw.prod(1).tolist())
        return {"features": [image.unflatten(0, grid_thw[0].tolist()) for image in images]}

    vision = {"patch_size": 4, "temporal_patch_size": 2, "in_channels": 3}
    batch = infer(model_of(forward, **vision)).batch(3)
    assert batch["grid_thw"].tolist() == 3 * batch["grid_thw"][:1].tolist()
    assert int(batch["grid_thw"].prod(1).sum()) == len(batch["hidden_states"])


def test_images_beside_their_target_sizes_are_one_strip_of_patches():
    def forward(self, pixel_values, target_sizes=None):
        counts = target_sizes.prod(1).sum().item()
        return {"features": pixel_values.unflatten(3, (counts, self.config.patch_size))}

    shapes = shapes_of(model_of(forward, main="pixel_values", patch_size=4))
    assert shapes["pixel_values"][:3] == (1, 3, 4) and shapes["target_sizes"] == (3, 2)


def test_an_argument_that_no_name_explains_has_the_shape_that_the_docstring_gives():
    def forward(self, states=None, actions=None, steps=None, lengths=None, riddle=None):
        """Run.

        Args:
            states (`torch.Tensor` of shape `(batch_size, episode_length, state_dim)`):
                Seen.
            actions (`torch.Tensor` of shape `[batch_size, 2 * len(config.arms)]`):
                Done.
            steps (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                When.
            lengths (`torch.LongTensor` of shape `(batch_size,)`):
                How long.
            riddle (`torch.Tensor` of shape `(batch_size, nobody_knows)`):
                What.
        """
        return states[:, 0, :4] + actions * F.one_hot(steps, 4)[:, 0] / lengths[:, None]

    model = model_of(forward, main="states", state_dim=5, arms=[0, 1])
    batch = infer(model).batch(3)
    assert {name: tuple(leaf.shape) for name, leaf in batch.items()} == {
        "states": (3, 16, 5),
        "actions": (3, 4),
        "steps": (3, 16),
        "lengths": (3,),
    }
    assert batch["steps"].dtype is torch.int64 and set(batch["lengths"].tolist()) == {1}


def test_tokens_of_several_codebooks_are_as_the_docstring_says():
    def forward(self, input_ids, decoder_input_ids, labels=None):
        """Run.

        decoder_input_ids (`torch.LongTensor` of shape `(batch_size * num_codebooks, length)`):
            Heard so far.
        labels (`torch.LongTensor` of shape `(batch_size, sequence_length, num_codebooks)`):
            Heard.
        """
        return decoder_input_ids.view(len(input_ids), 4, -1).transpose(1, 2) - labels

    model = model_of(forward, name="SomeForConditionalGeneration", num_codebooks=4)
    shapes = shapes_of(model)
    assert shapes == {"input_ids": (3, 16), "decoder_input_ids": (12, 16), "labels": (3, 16, 4)}


def test_a_text_that_is_read_and_one_that_is_written_have_vocabularies_of_their_own():
    class TwoTexts(Config):
        def get_text_config(self, encoder=False, decoder=False):
            if encoder == decoder:
                raise ValueError("ambiguous")
            return Config(vocab_size=7 if encoder else 90)

    def forward(self, input_ids, decoder_input_ids, labels=None):
        return input_ids

    model = model_of(forward, name="SomeForConditionalGeneration")
    model.config = TwoTexts(**SIZES)
    batch = infer(model).batch(30)
    assert int(batch["input_ids"].max()) < 7
    assert int(batch["decoder_input_ids"].max()) > 7 and int(batch["labels"].max()) > 7


def test_where_an_error_asks_for_labels_all_there_are_are_given():
    def forward(self, input_ids, pitch_labels=None, energy_labels=None):
        """Run.

        pitch_labels (`torch.Tensor` of shape `(batch_size, sequence_length + 1, 1)`):
            How high.
        energy_labels (`torch.Tensor` of shape `(batch_size, sequence_length + 1, 1)`):
            How loud.
        """
        if pitch_labels is None or energy_labels is None:
            raise ValueError("All labels must be provided")
        return input_ids[..., None] * pitch_labels * energy_labels

    model = model_of(forward)
    shapes = shapes_of(model)
    assert shapes["pitch_labels"] == shapes["energy_labels"] == (3, 16, 1)
    assert "energy_labels, pitch_labels" in infer(model).loss_note


def test_a_mask_of_truth_values_is_one():
    def forward(self, input_ids, padding_mask: torch.BoolTensor):
        return torch.where(~padding_mask, input_ids, 0)

    assert infer(model_of(forward)).batch(2)["padding_mask"].dtype is torch.bool


def test_boxes_are_parts_of_a_page_where_whole_numbers_do_not_run():
    def forward(self, input_ids, bbox):
        return input_ids * bbox.mean(-1)

    batch = infer(model_of(forward)).batch(2)
    assert batch["bbox"].shape == (2, 16, 4) and batch["bbox"].dtype is torch.float32


def test_one_number_of_each_sample_makes_a_column_where_a_row_does_not_run():
    def forward(self, past_values, freq):
        """Run.

        freq (`torch.LongTensor` of shape `(batch_size,)`):
            How often.
        """
        return past_values[:, :2] + freq @ torch.ones(1, 2, dtype=torch.int64)

    assert shapes_of(model_of(forward, main="past_values"))["freq"] == (3, 1)


def test_a_waveform_has_a_channel_where_the_docstring_says_so():
    def forward(self, input_values):
        """Hear.

        input_values (`torch.Tensor` of shape `(batch_size, 1, sequence_length)`):
            A waveform.
        """
        return input_values

    shapes = shapes_of(model_of(forward, main="input_values"))
    assert shapes["input_values"] == (3, 1, 160_000)


def test_a_model_that_hears_while_it_writes_gets_as_many_frames_as_tokens_need():
    def forward(self, input_ids, input_features):
        return input_features[:, 0].unflatten(1, (-1, 4)).mean(2) + input_ids

    shapes = shapes_of(model_of(forward))
    assert shapes["input_features"] == (3, 80, 4 * 16)


def test_inputs_of_any_kind_give_way_to_what_an_error_asks_for():
    def forward(self, inputs=None, input_values=None, input_features=None):
        """Run.

        inputs (`torch.Tensor` of shape `(batch_size, sequence_length)`):
            One of the others.
        """
        if input_values is None and input_features is None:
            raise ValueError("You have to specify either input_values or input_features")
        return input_values

    shapes = shapes_of(model_of(forward, main="inputs"))
    assert shapes == {"input_values": (3, 160_000)}


def test_two_sizes_are_changed_where_each_alone_is_not_enough():
    class SeesAndHears(nn.Module):
        main_input_name = "input_values"
        config = Config(**SIZES)

        def __init__(self) -> None:
            super().__init__()
            self.ear, self.eye = nn.Conv1d(1, 4, 3), nn.Linear(512, 4)

        def forward(self, input_values, pixel_values):
            return self.ear(input_values).mean((1, 2)) + self.eye(pixel_values).mean((1, 2, 3))

    assert shapes_of(SeesAndHears()) == {
        "input_values": (3, 1, 160_000),
        "pixel_values": (3, 3, 512, 512),
    }


class Wrapped(nn.Module):
    """A layer under the name that transformers gives its input."""

    def __init__(self, layer, main, **config) -> None:
        super().__init__()
        self.layer, self.main_input_name = layer, main
        self.config = Config(**config)

    def forward(self, input_features):
        return self.layer(input_features)


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Conv1d(80, 4, 3), (80, 1000)), (nn.Linear(80, 4), (1000, 80))]
)
def test_the_axes_of_a_spectrogram_are_those_that_run(layer, shape):
    assert shapes_of(Wrapped(layer, "input_features"))["input_features"][1:] == shape


def test_a_size_of_a_nested_config_counts_that_of_its_modality_first():
    audio, text = Config(num_mel_bins=20, max_source_positions=6), Config(num_mel_bins=99)
    model = Wrapped(nn.Conv1d(20, 4, 3), "input_features", decoder=text, audio_config=audio)
    assert shapes_of(model)["input_features"] == (3, 20, 12)


def test_a_time_series_is_as_long_as_its_context_and_lags():
    def forward(self, past_values, past_time_features, past_observed_mask, future_values):
        return past_values * past_observed_mask

    series = {"context_length": 10, "lags_sequence": [1, 7], "prediction_length": 4}
    shapes = shapes_of(
        model_of(forward, main="past_values", input_size=1, num_time_features=2, **series)
    )
    assert shapes == {
        "past_values": (3, 17),
        "past_time_features": (3, 17, 2),
        "past_observed_mask": (3, 17),
        "future_values": (3, 4),
    }


def test_an_argument_that_no_name_explains_asks_for_a_sample():
    model = model_of(lambda self, input_ids, riddle: input_ids)
    with pytest.raises(SampleError, match=r"'riddle'.*sample="):
        infer(model)


def test_what_a_model_caches_is_never_fake():
    config = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    for _ in range(2):  # the second would meet the fake coordinates of the first
        model = small("dinov3_vit", "AutoModel", num_attention_heads=2, **config)
        assert infer(model).batch(1)["pixel_values"].shape == (1, 3, 224, 224)


@pytest.mark.parametrize(
    ("name", "options", "shape", "classes"),
    [
        ("resnet18", {"num_classes": 10}, (3, 224, 224), 10),
        ("vit_tiny_patch16_224", {"img_size": 64, "in_chans": 1}, (1, 64, 64), 1000),
        ("tresnet_m", {"num_classes": 10}, (3, 224, 224), 10),  # folds pixels into channels
    ],
)
def test_a_timm_model_is_trained_by_cross_entropy_over_its_own_classes(
    name, options, shape, classes
):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, **options)
    inferred = infer(model)
    images, labels = inferred.batch(2)
    assert images.shape == (2, *shape) and 0 <= int(labels.max()) < classes
    assert f"{classes} classes" in inferred.loss_note
    assert inferred.loss is not None and inferred.loss(model, (images, labels)).requires_grad


def test_a_replaced_classifier_decides_the_range_of_the_labels():
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model("resnet18")
        model.fc = nn.Sequential(nn.Dropout(), nn.Linear(512, 3))
    assert "3 classes" in infer(model).loss_note
    model.fc = nn.Identity()
    assert infer(model).loss is None


@pytest.mark.parametrize(
    ("name", "side", "classes"),
    [("resnet18", 224, 1000), ("inception_v3", 299, 1000), ("fcn_resnet50", 480, 21)],
)
def test_a_torchvision_model_is_trained_with_its_auxiliary_heads(name, side, classes):
    models = pytest.importorskip("torchvision").models
    options = {"weights_backbone": None, "aux_loss": True} if "fcn" in name else {}
    if name == "inception_v3":
        options = {"init_weights": False}
    with torch.device("meta"):
        model = models.get_model(name, weights=None, **options)
    inferred = infer(model)
    assert f"{classes} classes" in inferred.loss_note and inferred.loss is not None
    batch = [leaf.to("meta") for leaf in inferred.batch(2)]
    assert batch[0].shape == (2, 3, side, side)
    assert inferred.loss(model, batch).requires_grad


def test_a_detection_model_asks_for_a_workload():
    models = pytest.importorskip("torchvision").models
    with torch.device("meta"):
        model = models.get_model("ssdlite320_mobilenet_v3_large", weights_backbone=None)
    with pytest.raises(SampleError, match="use a Workload"):
        infer(model)


def test_a_lightning_module_trains_by_its_training_step():
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)
            self.example_input_array = torch.rand(2, 6)

        def forward(self, x):
            return self.layer(x)

        def training_step(self, batch, batch_index):
            loss = (self(batch) ** 2).mean()
            self.log("loss", loss)
            return loss

    model = Module()
    inferred = infer(model)
    assert inferred.loss is not None and inferred.loss(model, inferred.batch(5)).requires_grad


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # in peft
def test_adapters_are_looked_through():
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    inferred = infer(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    assert infer(adapted).inputs_note == inferred.inputs_note
    assert infer(adapted).batch(2).keys() == inferred.batch(2).keys()
