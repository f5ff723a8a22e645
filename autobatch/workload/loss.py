"""The loss of a micro-batch: the user's, checked, or found in what the model returns.

Invariant: whatever a backward pass begins with here is one value that has a gradient.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from autobatch.errors import WorkloadError
from autobatch.support.wording import passing, said_by
from autobatch.workload.tree import tensors

__all__ = ["Criterion", "DefaultLoss", "as_loss", "checked_loss", "output_of"]

_OUTPUTS = frozenset(
    "input inputs output outputs pred preds prediction predictions logits y_pred y_hat".split()
)
"""How functions that compare outputs with labels name the former."""

_MODELS = re.compile(r"model|module|net|student|^m$")
"""How losses of (model, batch) name the former; some name only the latter."""

_BATCHES = frozenset("batch minibatch data sample samples example examples".split())

_LABELS = re.compile(r"label|target|answer|truth|class|(^|_)(y|gt|tgt)($|_)")
_INPUTS = re.compile(
    r"len|mask|pos|idx|index|ids?$|type|seg|time|step|hidden|state|cond|edge|batch|token|emb"
    r"|memory|context|(^|_)[thc]($|_)"
)
"""How models name a second argument that is the labels, or another input."""

_TAKEN_FOR_A_MODEL = re.compile(r"Tensor' object (is not callable|has no attribute)")


def checked_loss(value: Any) -> Tensor:
    """Return what a loss function gave, if a backward pass can begin with it.

    Raises:
        WorkloadError: it is no tensor, not a scalar, or has no gradient.
    """
    if not isinstance(value, Tensor):
        raise WorkloadError(
            f"the loss is a {type(value).__name__}, not a tensor: return the scalar loss from "
            "loss(model, batch)"
        )
    if value.dim() and value.numel() != 1:
        raise WorkloadError(
            f"the loss has shape {tuple(value.shape)}, not one value: reduce it, "
            "for instance with .mean()"
        )
    if not value.requires_grad:
        raise WorkloadError(
            "the loss has no gradient: check that parameters require gradients and that the loss "
            "was not detached or computed under no_grad"
        )
    return value


def output_of(model: nn.Module, batch: Any) -> Any:
    """Call a model on a batch: mappings become keywords, lists and tuples arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (list, tuple)) else model(batch)


def as_loss(loss: Any) -> Any:
    """Return a loss of (model, batch): a criterion of (outputs, labels) is made one.

    A module is a criterion unless its `forward` takes the model, or the batch, by their names; a
    function is one if it calls its first argument as PyTorch does, "input", or by another name of
    outputs.

    >>> [type(as_loss(criterion)).__name__ for criterion in (nn.CrossEntropyLoss(), F.mse_loss)]
    ['Criterion', 'Criterion']
    >>> as_loss(DefaultLoss) is DefaultLoss
    True
    """
    function = loss.forward if isinstance(loss, nn.Module) else loss
    try:
        first, second, *_ = (*inspect.signature(function).parameters, "", "")
    except (TypeError, ValueError):  # no function, or one without a signature
        return loss
    takes_model = _MODELS.search(first.lower()) or second.lower() in _BATCHES
    if first in _OUTPUTS or (isinstance(loss, nn.Module) and not takes_model):
        return Criterion(loss)
    return loss


def _name_of(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _takes_only_inputs(model: nn.Module, batch: Any) -> bool:
    """Whether a batch is a pair of which the model's `forward` takes the first alone.

    So it does where a second argument is a switch, or a mask, which classes are not.
    """
    if not isinstance(batch, (list, tuple)) or len(batch) != 2:
        return False
    try:
        signature = _signature_of(model)
        signature.bind(batch[0])
    except (TypeError, ValueError):
        return False
    try:
        signature.bind(*batch)
    except TypeError:
        return True
    second = _second(signature)
    if second is None or not isinstance(batch[1], Tensor) or _LABELS.search(second.name.lower()):
        return False
    is_list = batch[1].dim() == 1 and not batch[1].is_floating_point()
    is_switch = isinstance(second.default, (bool, str)) and batch[1].dim() > 0
    return is_switch or (is_list and "mask" in second.name.lower())


def _second(signature: inspect.Signature) -> inspect.Parameter | None:
    """Return a second argument that need not be given; None where there is none."""
    second = list(signature.parameters.values())[1:2]
    return next((each for each in second if each.default is not inspect.Parameter.empty), None)


def _unclear(model: nn.Module, batch: Any) -> str | None:
    """Return the argument that a pair's second part becomes, if it is neither labels nor input."""
    if not isinstance(batch, (list, tuple)) or len(batch) != 2:
        return None
    try:
        second = _second(_signature_of(model))
    except (TypeError, ValueError):
        return None
    if second is None or _LABELS.search(second.name.lower()) or _INPUTS.search(second.name.lower()):
        return None
    return second.name


def _signature_of(model: Any) -> inspect.Signature:
    """Return what a model's `forward` takes; below wrappers that pass on whatever they get.

    Such are those of peft, of data parallelism, and a method that is replaced on an object.

    Raises:
        ValueError: there is no signature.
    """
    for forward in (model.forward, MethodType(type(model).forward, model)):
        signature = inspect.signature(forward)
        kinds = {parameter.kind for parameter in signature.parameters.values()}
        if kinds != {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
            return signature
    children = [*model.children()]
    inner = children[0] if len(children) == 1 else None
    if hasattr(model, "get_base_model"):  # peft's, which may have a prompt beside the model
        inner = model.get_base_model()
    return signature if inner is None else _signature_of(inner)


def _are_classes(output: Any, labels: Any) -> bool:
    """Whether labels can be the classes that an output has logits of."""
    return (
        isinstance(output, Tensor)
        and isinstance(labels, Tensor)
        and output.is_floating_point()
        and not (labels.is_floating_point() or labels.is_complex())
        and output.dim() >= 2
        and (output.shape[0], *output.shape[2:]) == tuple(labels.shape)
    )


def _called(batch: Any, name: str = "batch") -> str:
    """Return how `output_of` calls a model on a batch, as code.

    >>> _called({"x": 1}), _called((1, 2)), _called(1, "batch[0]")
    ('model(**batch)', 'model(*batch)', 'model(batch[0])')
    """
    if isinstance(batch, Mapping):
        return f"model(**{name})"
    return f"model(*{name})" if isinstance(batch, (list, tuple)) else f"model({name})"


class DefaultLoss:
    """Find a loss in what the model returns, and remember how.

    The output lives until the next one has been computed, as in the loops of most examples:
    `outputs = model(**batch)`, then `outputs.loss`.

    Args:
        like: the model as its user wrote it, of which it is asked whether it takes labels; None
            asks the one that is called, which levers may have wrapped.

    Attributes:
        kind: "output.loss", "mean of output.loss", "scalar output", "cross entropy" or "surrogate
            sum"; None before the first call.
        code: the expression of `model` and `batch` that gives the same loss; None before the first
            call, and for a sum that stands in for a loss.
    """

    def __init__(self, like: nn.Module | None = None) -> None:
        self._like = like
        self.kind: str | None = None
        self.code: str | None = None
        self._output: Any = None

    def forget(self) -> None:
        """Let the last output go, as the end of a loop's function does."""
        self._output = None

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Call the model on the batch and return the loss.

        Raises:
            WorkloadError: the model returns no floating-point tensor, it takes no labels and what
                the labels of the batch are compared with is not clear, or nor is what it takes.
        """
        like = model if self._like is None else self._like
        if _takes_only_inputs(like, batch):
            return self._of_classes(model, *batch)
        output: Any = output_of(model, batch)
        self._output = output
        named = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if isinstance(named, Tensor):
            is_attribute = isinstance(getattr(output, "loss", None), Tensor)
            self.code = _called(batch) + (".loss" if is_attribute else '["loss"]')
            if named.numel() == 1:
                self.kind = "output.loss"
                return named
            self.code += ".mean()"
            self.kind = "mean of output.loss"  # one value a sample: a loop has to reduce it
            return named.mean()
        if isinstance(output, Tensor) and output.numel() == 1:
            self.kind, self.code = "scalar output", _called(batch)
            return output
        floating = [tensor for tensor in tensors(output) if tensor.is_floating_point()]
        if not floating:
            raise WorkloadError(
                f"the model returns {type(output).__name__} without a floating-point tensor: "
                + passing("loss", "lambda model, batch: …")
            )
        name = _unclear(like, batch)
        if name is not None and _are_classes(floating[0], batch[1]):
            raise WorkloadError(
                f"the second part of the batch may be labels, or what {type(like).__name__} takes "
                f"as {name!r}: {passing('loss', 'nn.CrossEntropyLoss()')} or "
                "loss=lambda model, batch: …"
            )
        self.kind, self.code = "surrogate sum", None
        return self.stand_in(floating)

    def _of_classes(self, model: nn.Module, inputs: Any, labels: Any) -> Tensor:
        output = self._output = output_of(model, inputs)
        if not _are_classes(output, labels):
            raise WorkloadError(
                f"{type(model).__name__} takes the inputs alone, and how its output is compared "
                f"with the labels is not known: {passing('loss', 'nn.MSELoss()')} or "
                "loss=lambda model, batch: …"
            )
        self.kind = "cross entropy"
        called = _called(inputs, "batch[0]")
        self.code = f"torch.nn.functional.cross_entropy({called}, batch[1].long())"
        return F.cross_entropy(output, labels.long())

    def stand_in(self, outputs: Sequence[Tensor]) -> Tensor:
        """Make a scalar of the floating-point outputs, where no loss is known."""
        total = outputs[0].sum()
        for output in outputs[1:]:
            total = total + output.sum()
        return total


class Criterion(DefaultLoss):
    """A function of (outputs, labels), such as `nn.CrossEntropyLoss()`, as a loss of a batch."""

    def __init__(self, criterion: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        self.criterion = criterion

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Compare what the model makes of the inputs with the labels.

        Raises:
            WorkloadError: the batch is not a pair of inputs and labels, or the criterion uses the
                outputs as if they were the model.
        """
        if not isinstance(batch, (list, tuple)) or len(batch) != 2:
            raise WorkloadError(
                f"the loss {_name_of(self.criterion)} compares outputs with labels, and the batch "
                f"is not (inputs, labels): {passing('loss', 'lambda model, batch: …')}"
            )
        inputs, labels = batch
        self._output = output_of(model, inputs)
        try:
            return self.criterion(self._output, labels)
        except (TypeError, AttributeError) as error:
            if not _TAKEN_FOR_A_MODEL.search(str(error)):
                raise
            raise WorkloadError(
                f"the loss {_name_of(self.criterion)} was called as a criterion, with (outputs, "
                f"labels), and raised {said_by(error)}: if it takes (model, batch), "
                "pass loss=lambda model, batch: criterion(model, batch)"
            ) from error
