"""The chunked loss is the loss, for every model that it takes, and others are refused."""

from __future__ import annotations

import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autobatch.errors import UsageError
from autobatch.levers.losses import chunk_loss, chunked_cross_entropy, is_chunkable
from tests.levers.setups import llama

SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


@pytest.mark.parametrize("chunks", [1, 3, 8, 50])
def test_any_number_of_chunks_gives_the_loss_and_its_gradients(chunks: int) -> None:
    torch.manual_seed(0)
    head = nn.Linear(6, 11, bias=True).double()
    hidden = torch.randn(3, 13, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(11, (3, 13))
    labels[0, :5] = -100
    whole = F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten())
    wanted = torch.autograd.grad(whole, (hidden, *head.parameters()))
    loss = chunked_cross_entropy(hidden, head, labels, chunks=chunks)
    torch.testing.assert_close(loss, whole)
    torch.testing.assert_close(torch.autograd.grad(loss, (hidden, *head.parameters())), wanted)


def test_bad_arguments_are_refused() -> None:
    hidden, labels = torch.ones(2, 3, 4), torch.zeros(2, 3).long()
    with pytest.raises(UsageError, match="chunks is 0"):
        chunked_cross_entropy(hidden, nn.Linear(4, 5), labels, chunks=0)
    with pytest.raises(UsageError, match=r"labels of shape \(2, 2\)"):
        chunked_cross_entropy(hidden, nn.Linear(4, 5), labels[:, :2])
    with pytest.raises(UsageError, match="Linear is no causal language model"):
        chunk_loss(nn.Linear(2, 2))


TAKEN = "gemma gpt2 gpt_neox llama olmo2 phi qwen2 stablelm".split()
REFUSED = {
    "gemma2": "caps its logits",
    "granite": "divides its logits",
    "bert": "has layers between hidden states and logits",
}


def small(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(kind, **SIZES, is_decoder=True)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize("kind", TAKEN)
def test_a_model_of_transformers_keeps_its_loss_and_its_gradients(kind: str) -> None:
    model = small(kind).double()
    ids = torch.randint(3, 60, (2, 9))
    loss = model(input_ids=ids, labels=ids).loss
    parameters = list(model.parameters())
    wanted = torch.autograd.grad(loss, parameters)
    chunk_loss(model, chunks=4)
    output = model(input_ids=ids, labels=ids)
    assert output.logits is None
    torch.testing.assert_close(output.loss, loss)
    found = torch.autograd.grad(output.loss, parameters)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_whose_loss_is_of_something_else_than_plain_logits_is_refused(kind: str) -> None:
    model = small(kind)
    assert not is_chunkable(model)
    with pytest.raises(UsageError, match="no causal language model of Transformers that gives"):
        chunk_loss(model)


def test_a_model_with_a_chunked_loss_is_what_it_was_elsewhere() -> None:
    model = llama().model
    ids = torch.randint(1000, (2, 8))
    logits = model.eval()(input_ids=ids, labels=ids).logits
    assert chunk_loss(model) is model
    torch.testing.assert_close(model(input_ids=ids, labels=ids).logits, logits)
    model.train()
    assert model(input_ids=ids).logits.shape == (2, 8, 1000)
    assert model(input_ids=ids, labels=ids, return_dict=False)[0].requires_grad
    assert model(ids, None, None, None, None, ids).logits is None  # labels by their place
    assert "forward" not in vars(model.lm_head)
    summed = model(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(7)).loss
    torch.testing.assert_close(summed * 7, model(input_ids=ids, labels=ids).loss * 14)
    again = pickle.loads(pickle.dumps(model))
    assert again(input_ids=ids, labels=ids).logits is None


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's
def test_a_model_that_peft_wraps_can_have_its_loss_chunked() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"])
    model = peft.get_peft_model(llama().model, config)
    ids = torch.randint(1000, (2, 8))
    loss = model.train()(input_ids=ids, labels=ids).loss
    chunk_loss(model)
    torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, loss)
