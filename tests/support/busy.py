"""A model in the middle of a run that changes whatever can change, and all of its state."""

import random
from copy import deepcopy

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class Busy(nn.Module):
    """Changes in a forward pass what can change: buffers, attributes, random states."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.norm = nn.BatchNorm1d(16)
        self.drop = nn.Dropout(0.5)
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("calls", torch.zeros(()))
        self.history = []
        self.fail_with = None

    def forward(self, tokens):
        self.calls += 1
        self.history.append(tokens.shape)
        random.random()
        np.random.rand()
        torch.rand(3)
        if self.fail_with is not None:
            raise self.fail_with
        states = self.norm(self.embed(tokens).transpose(1, 2)).transpose(1, 2)
        return self.head(self.frozen(self.drop(states)))


TOKENS = torch.arange(24).reshape(8, 3)


def lm_loss(model, batch):
    return F.cross_entropy(model(batch).flatten(0, 1), batch.flatten())


def trained(device="cpu"):
    """A model and its optimizer in the middle of a run, with hooks and a gradient pending."""
    torch.manual_seed(0)
    model = Busy().to(device)
    model.norm.eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    calls = []
    model.head.register_forward_hook(lambda *_: calls.append("hook"))
    for _ in range(2):
        lm_loss(model, TOKENS.to(device)).backward()
        optimizer.step()
    return model, optimizer, calls


def tensor_facts(tensor):
    return (
        tensor.detach().cpu().numpy().tobytes(),
        tensor.shape,
        tensor.stride(),
        tensor.dtype,
        tensor.device,
        tensor.requires_grad,
        id(tensor),
        tensor._version,
        None if tensor.grad is None else (id(tensor.grad), tensor.grad.cpu().numpy().tobytes()),
    )


def state_of(model, optimizer, sample):
    """Everything that a simulation could have changed, as plain values."""
    hooks = "_forward_hooks _forward_pre_hooks _backward_hooks _state_dict_hooks".split()
    return {
        "tensors": {
            name: tensor_facts(t) for name, t in [*model.named_parameters(), *model.named_buffers()]
        },
        "modules": {
            name: (
                id(m),
                m.training,
                m.__class__,
                sorted(vars(m)),
                [len(vars(m)[h]) for h in hooks],
            )
            for name, m in model.named_modules()
        },
        "history": list(model.history),
        "tied": model.head.weight is model.embed.weight,
        "optimizer": deepcopy(
            [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        ),
        "optimizer parameters": [id(p) for g in optimizer.param_groups for p in g["params"]],
        "optimizer state": {
            (id(parameter), key): tensor_facts(value)
            for parameter, state in optimizer.state.items()
            for key, value in state.items()
        },
        "optimizer hooks": [len(v) for k, v in vars(optimizer).items() if k.endswith("_hooks")],
        "sample": tensor_facts(sample),
        "torch random": torch.get_rng_state().numpy().tobytes(),
        "cuda random": [
            state.numpy().tobytes()
            for state in (torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])
        ],
        "python random": random.getstate(),
        "numpy random": np.random.get_state()[1].tobytes(),
        "defaults": (
            torch.get_default_dtype(),
            torch.get_default_device(),
            torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.cudnn.enabled,
            torch.backends.cudnn.benchmark,
            torch.backends.cudnn.allow_tf32,
            torch.is_autocast_enabled("cpu"),
        ),
        "patches": (
            torch.cuda.is_available(),
            torch.cuda.device_count,
            torch.autocast,
            torch.optim.AdamW.step,
            F.scaled_dot_product_attention,
            nn.Module.__call__,
        ),
    }
