"""The evaluation that transformers' Trainer runs while it trains, as a step of a workload.

`Trainer.evaluate` keeps the logits and labels of all batches (and the inputs, for metrics that ask
for them) on the GPU until it ends, or until `eval_accumulation_steps` of them are there, and joins
them as they come: for a moment, all that was kept is there twice. Invariant: the trainer that is
given is read, never changed; `__call__` runs on the copy that a probe makes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from autobatch.errors import AutobatchError
from autobatch.support.patching import patched
from autobatch.support.wording import one_line
from autobatch.workload.dataset import draw
from autobatch.workload.sample import built
from autobatch.workload.tree import map_tensors, tensors

__all__ = ["Evaluation", "evaluation_of"]


class Evaluation:
    """The last batch of an evaluation, with all that is kept of those before it.

    Attributes:
        kept: batches whose outputs are on the GPU at once.
    """

    def __init__(self, trainer: Trainer, batch: Any, *, kept: int, loss_only: bool):
        """Evaluate a batch, which is on the CPU, with a trainer's own step."""
        self._trainer = trainer
        self._batch = batch
        self._loss_only = loss_only
        self.kept = 1 if loss_only and not _keeps_inputs(trainer) else kept

    def __call__(self, model: nn.Module, _: Any) -> None:
        """Run the step, and join its outputs with those that were kept."""
        trainer = self._trainer
        device = next(model.parameters()).device
        inputs = map_tensors(lambda tensor: tensor.to(device), self._batch)
        with patched(trainer, _prepare_inputs=_as_they_are):
            _loss, logits, labels = trainer.prediction_step(model, inputs, self._loss_only)
        if logits is not None and trainer.preprocess_logits_for_metrics is not None:
            logits = trainer.preprocess_logits_for_metrics(logits, labels)
        decoded = inputs[_main_input(trainer)] if _keeps_inputs(trainer) else None
        parts = (logits, labels, decoded)
        before = [
            [self._kept_of(tensor, self.kept - 1) for tensor in tensors(part) if tensor.dim()]
            for part in parts
        ]
        if not trainer.args.eval_do_concat_batches:
            return
        whole = []
        for part, old in zip(parts, before, strict=True):
            new = [self._gathered(tensor) for tensor in tensors(part) if tensor.dim()]
            whole.append([torch.cat(pair) for pair in zip(old, new, strict=True)])
            old.clear()

    def _gathered(self, tensor: Tensor) -> Tensor:
        """Return an output of one batch on all ranks."""
        return self._kept_of(tensor, 1) if self._trainer.args.world_size > 1 else tensor

    def _kept_of(self, tensor: Tensor, batches: int) -> Tensor:
        """Return memory for an output of some batches, which all ranks gather."""
        rows = len(tensor) * batches * int(self._trainer.args.world_size)
        return tensor.new_empty((rows, *tensor.shape[1:]))


def _keeps_inputs(trainer: Trainer) -> bool:
    return "inputs" in (getattr(trainer.args, "include_for_metrics", None) or ())


def _main_input(trainer: Trainer) -> str:
    return str(getattr(trainer.model, "main_input_name", "input_ids"))


def _as_they_are(inputs: Any) -> Any:
    return inputs


def evaluation_of(trainer: Trainer) -> Evaluation | str | None:
    """Return the evaluation that a trainer runs while it trains, or why it cannot be probed.

    None where it runs none.
    """
    args, data = trainer.args, trainer.eval_dataset
    if str(getattr(args.eval_strategy, "value", args.eval_strategy)) == "no" or data is None:
        return None
    if isinstance(data, dict):
        sized = [part for part in data.values() if hasattr(part, "__len__")]
        data = max(sized, key=len, default=None)
    if getattr(args, "predict_with_generate", False):
        return "it generates"
    if type(trainer).evaluation_loop is not Trainer.evaluation_loop:
        return f"{type(trainer).__name__} has an evaluation loop of its own"
    if not type(trainer).evaluate.__module__.startswith("transformers."):
        return f"{type(trainer).__name__} has an evaluate of its own"
    if not hasattr(data, "__len__"):
        return "its data set does not tell its length"
    try:
        make = built(draw(trainer.get_eval_dataloader(data)))
    except AutobatchError as error:
        return one_line(error)
    batches = -(-len(data) // max(1, args.eval_batch_size * args.world_size))
    kept = min(batches, args.eval_accumulation_steps or batches)
    return Evaluation(
        trainer,
        make(min(args.eval_batch_size, len(data))),
        kept=1 if args.batch_eval_metrics else kept,
        loss_only=trainer.compute_metrics is None or args.prediction_loss_only,
    )
