"""Cross entropy of a language model without its logits ever being whole.

The logits of a micro-batch, one for each word of the vocabulary at each position, are often the
largest tensors of a training run. Here they are made for one chunk of the positions at a time, in
the forward pass and, by checkpointing, once more in the backward pass. The loss is the same number.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autobatch.errors import UsageError
from autobatch.support.patching import patched
from autobatch.support.wording import count

__all__ = ["chunk_loss", "chunked_cross_entropy", "is_chunkable"]


def chunked_cross_entropy(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    labels: Tensor,
    *,
    chunks: int = 8,
    ignore_index: int = -100,
) -> Tensor:
    """Return the mean cross entropy of what a head makes of hidden states, chunk by chunk.

    The same as `F.cross_entropy(head(hidden).float().flatten(0, -2), labels.flatten())`, with one
    chunk of the logits in memory at a time. Positions are cut along the last dimension but one.

    Args:
        hidden: (..., positions, features), what the head takes.
        head: gives (..., positions, classes), such as an `nn.Linear`.
        labels: (..., positions), whole numbers; they are not shifted.
        chunks: how many.
        ignore_index: the label of positions that do not count.

    Raises:
        UsageError: there is less than one chunk, or labels have another shape than positions.

    >>> head, hidden, labels = nn.Linear(4, 10), torch.randn(2, 6, 4), torch.arange(12).view(2, 6)
    >>> loss = chunked_cross_entropy(hidden, head, labels % 10, chunks=3)
    >>> whole = F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten() % 10)
    >>> torch.allclose(loss, whole)
    True
    """
    total = _summed(hidden, head, labels, chunks, ignore_index)
    return total / (labels != ignore_index).sum()


def _summed(
    hidden: Tensor, head: Callable[[Tensor], Tensor], labels: Tensor, chunks: int, ignored: int
) -> Tensor:
    if isinstance(chunks, bool) or not isinstance(chunks, int) or chunks < 1:
        raise UsageError(f"chunks is {chunks!r}: use a positive whole number")
    if hidden.shape[:-1] != labels.shape:
        raise UsageError(
            f"hidden states of shape {tuple(hidden.shape)} have positions that labels of shape "
            f"{tuple(labels.shape)} do not: give one label for each position"
        )

    def of_chunk(part: Tensor, wanted: Tensor) -> Tensor:
        logits = head(part)
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        return F.cross_entropy(
            logits.flatten(0, -2), wanted.flatten(), ignore_index=ignored, reduction="sum"
        )

    total: Any = 0.0
    parts = zip(
        hidden.tensor_split(chunks, dim=-2), labels.tensor_split(chunks, dim=-1), strict=True
    )
    for part, wanted in parts:
        if wanted.numel():
            total = total + checkpoint(
                of_chunk, part, wanted, use_reentrant=False, preserve_rng_state=False
            )
    return total  # type: ignore[no-any-return]


def chunk_loss(model: nn.Module, *, chunks: int = 8) -> nn.Module:
    """Let a causal language model of Transformers compute the loss of its labels by chunks.

    In training, `model(input_ids=…, labels=…).loss` is the number that it was, and `.logits` is
    None. Without labels, and in eval mode, the model does what it did. Changes the model in place,
    and returns it; one that peft wraps stays wrapped.

    Args:
        model: a model for which `is_chunkable` holds.
        chunks: into how many parts the positions of a sequence are cut.

    Raises:
        UsageError: the model is no such model, or there is less than one chunk.
    """
    if isinstance(chunks, bool) or not isinstance(chunks, int) or chunks < 1:
        raise UsageError(f"chunks is {chunks!r}: use a positive whole number")
    inner = _inner(model)
    if not is_chunkable(inner):
        raise UsageError(
            f"{type(inner).__name__} is no causal language model of Transformers that gives the "
            "logits of its head to the usual loss, as they are: call "
            f"chunked_cross_entropy(hidden, head, labels) where its loss is computed, or leave "
            f"{count(chunks, 'chunk')} out"
        )
    inner.forward = functools.update_wrapper(
        functools.partial(_forward, inner, chunks, inner.forward), inner.forward
    )
    return model


def is_chunkable(model: nn.Module) -> bool:
    """Return whether `chunk_loss` can take a model: its loss has to be a function of plain logits.

    The source of its `forward` has to give the head's result to the model's loss function alone,
    with nothing done to either: no cap or scale on logits, no other loss added.
    """
    from autobatch.levers.forward_source import has_plain_loss

    return has_plain_loss(_inner(model))


def _inner(model: Any) -> Any:
    """Return the model of Transformers that peft wraps."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _forward(model: Any, chunks: int, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a model's own forward pass with a head that hands hidden states on to a chunked loss."""
    given = inspect.signature(plain).bind_partial(*args, **kwargs).arguments
    if not model.training or given.get("labels", kwargs.get("labels")) is None:
        return plain(*args, **kwargs)
    head = model.get_output_embeddings()
    loss = functools.partial(_loss, head.forward, chunks)
    with _with_attribute(head, "forward", _handed_on), patched(model, loss_function=loss):
        output = plain(*args, **kwargs)
    if isinstance(output, Mapping):
        return type(output)(**{name: part for name, part in output.items() if name != "logits"})
    return (output[0], *output[2:])


def _handed_on(hidden: Tensor) -> Tensor:
    return hidden


def _loss(
    head: Callable[[Tensor], Tensor],
    chunks: int,
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Any = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Do what `ForCausalLMLoss` of Transformers does, to hidden states in the place of logits."""
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:].contiguous()
    shift_labels = shift_labels.to(logits.device)
    total = _summed(logits, lambda part: head(part).float(), shift_labels, chunks, ignore_index)
    if num_items_in_batch is None:
        return total / (shift_labels != ignore_index).sum()
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch  # type: ignore[no-any-return]


@contextlib.contextmanager
def _with_attribute(of: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of an object itself; afterwards it has its own one again, or none."""
    own = vars(of)
    before = own.get(name)
    own[name] = value
    try:
        yield
    finally:
        if before is None:
            del own[name]
        else:
            own[name] = before
