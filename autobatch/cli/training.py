"""What a command says of the training beside what `tune` takes: inputs, number format, levers.

Invariant: reading what was typed imports no torch. Levers are those of `autobatch advise`: they
change the copy that runs, and the code that does the same by hand is told as a note.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from autobatch.cli.inputs import Input, InputBatches, inputs_of, loaded_sample
from autobatch.errors import UsageError
from autobatch.records.applied import AppliedLever
from autobatch.support.wording import listed, near

if TYPE_CHECKING:
    from torch import nn

    from autobatch.gpus.catalogue import GpuSpec
    from autobatch.levers.lever import Lever, Option
    from autobatch.levers.setup import Setup
    from autobatch.workload.workload import Workload

__all__ = ["Lora", "Training", "training_of"]

_CHECKPOINTING = {
    "full": "every block",
    "selective": "selective",
    "every=2": "every 2nd block",
    "every=3": "every 3rd block",
    "every=4": "every 4th block",
}
"""How the option and the lever name a setting."""

_LORA = "write r=16, or r=16,targets=q_proj,v_proj"
_ALL_LINEAR = "all-linear"

_LINE = 200
"""Code of more characters is no line."""

_TENSOR_CORES = (8, 0)
_TF32 = 'torch.set_float32_matmul_precision("high")'


@dataclass(frozen=True, slots=True)
class Lora:
    """LoRA as it was asked for.

    Attributes:
        rank: of the matrices.
        targets: names of the layers that get them; none for those that suit the model.
    """

    rank: int
    targets: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How a model is trained, beside what `tune` takes.

    Attributes:
        inputs: the tensors of a batch; none to infer them.
        sample: names a batch of the user's.
        precision: as the option names it.
        checkpointing: the value of the lever.
        lora: the rank and its layers.
    """

    inputs: tuple[Input, ...] = ()
    sample: str | None = None
    precision: str | None = None
    checkpointing: str | None = None
    lora: Lora | None = None

    @property
    def says_nothing(self) -> bool:
        """Whether the model is trained as its SPEC says."""
        return self == Training()

    def of(self, model: nn.Module | Workload, gpus: Sequence[GpuSpec]) -> Workload:
        """Return a workload that is trained so.

        Args:
            model: what the SPEC names.
            gpus: the cards that it is trained on.

        Raises:
            UsageError: the model or a card has no such setting.
        """
        from autobatch.levers.lever import applied
        from autobatch.levers.setup import Setup

        self._set_products()  # again: the user's code may have set it as it was imported
        setup = Setup(workload=self._with_batches(model), gpu=gpus[0])
        if self.precision == "fp32":
            setup = setup.having(autocast=None)
        elif self.precision in ("bf16", "fp16"):
            setup = setup.having(autocast=self.precision)
        options = list(self._options(setup, gpus))
        setup = applied(setup, options)
        notes = (*setup.workload.notes, *map(_note, options))
        levers = setup.workload.levers
        if self.precision == "tf32":
            notes = (*notes, f"with precision: tf32: `{_TF32}`")
            code = f"import torch\n{_TF32}"
            tf32 = AppliedLever(lever="precision", value="tf32", code=code, trainer="tf32=True")
            levers = (tf32, *levers)
        return replace(setup.workload, notes=tuple(dict.fromkeys(notes)), levers=levers)

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Let float32 matrix products be as they were asked for: a setting of the process."""
        if self.precision not in ("fp32", "tf32"):
            yield
            return
        from autobatch.support.products import products_in_tf32

        with products_in_tf32(self.precision == "tf32"):
            yield

    def _set_products(self) -> None:
        import torch

        if self.precision in ("fp32", "tf32"):
            torch.set_float32_matmul_precision("high" if self.precision == "tf32" else "highest")

    def _with_batches(self, model: nn.Module | Workload) -> Workload:
        from autobatch.workload.complete import Asked
        from autobatch.workload.workload import Workload

        if self.sample is not None:
            return Asked(model=model, sample=loaded_sample(self.sample)).workload()
        if not self.inputs:
            return Asked(model=model).workload()
        batch = InputBatches(self.inputs)
        said = f"a sample is {', '.join(map(str, self.inputs))}, as --input-shape says"
        if not isinstance(model, Workload):
            return Workload(model=model, batch=batch, notes=(said,))
        notes = (*model.notes, said)
        return replace(model, batch=batch, sample_limit=None, stream=(), notes=notes)

    def _options(self, setup: Setup, gpus: Sequence[GpuSpec]) -> Iterator[Option]:
        """Yield the options of levers that were asked for, in the order of the levers."""
        from autobatch.levers.checkpointing import CHECKPOINTING
        from autobatch.levers.lora import lora
        from autobatch.levers.precision import PRECISION

        if self.precision in ("tf32", "bf16-pure"):
            for gpu in gpus:
                if gpu.compute_capability < _TENSOR_CORES:
                    raise UsageError(
                        f"--precision is {self.precision}, which {gpu.name} has no tensor cores "
                        "for (compute capability 8.0 or more): use fp32 or fp16"
                    )
            if self.precision == "bf16-pure":
                yield _offered(
                    PRECISION, setup, "bf16 weights", "--precision bf16-pure", _why_not_pure
                )
        if self.lora is not None:
            targets = self.lora.targets
            own = None if targets in ((), (_ALL_LINEAR,)) else targets
            wanted = f"rank {self.lora.rank}, "
            lever = lora(ranks=[self.lora.rank], modules=own)
            offered = [option.value for option in lever.options(setup)]
            linear = f"{wanted}all linear"
            at_first = linear if targets == (_ALL_LINEAR,) or not offered else offered[0]
            yield _offered(lever, setup, at_first, "--lora", _why_no_lora)
        if self.checkpointing is not None:
            yield _offered(
                CHECKPOINTING,
                setup,
                self.checkpointing,
                "--activation-checkpointing",
                _why_not_checkpointed,
            )


def training_of(arguments: argparse.Namespace) -> Training:
    """Return what a command says of the training.

    Raises:
        UsageError: it cannot be understood.
    """
    asked: str = getattr(arguments, "activation_checkpointing", None) or "none"
    adapters: str | None = getattr(arguments, "lora", None)
    if asked not in ("none", *_CHECKPOINTING):
        known = ("none", *_CHECKPOINTING)
        raise UsageError(
            f"--activation-checkpointing is {asked!r}{near(asked, known)}: use "
            f"{', '.join(known)}; without a word, which is full, it comes after SPEC"
        )
    return Training(
        inputs=inputs_of(getattr(arguments, "input_shape", ())),
        sample=getattr(arguments, "sample", None),
        precision=getattr(arguments, "precision", None),
        checkpointing=_CHECKPOINTING.get(asked),
        lora=None if adapters is None else _lora_of(adapters),
    )


def _lora_of(text: str) -> Lora:
    """Return LoRA's rank and layers.

    Raises:
        UsageError: the text is not written r=N[,targets=A,B].

    >>> _lora_of("r=16,targets=q_proj,v_proj")
    Lora(rank=16, targets=('q_proj', 'v_proj'))
    """
    found: dict[str, list[str]] = {}
    key = "r"
    for part in (part.strip() for part in text.split(",")):
        name, equals, value = part.rpartition("=")
        key = name.strip() if equals else key
        found.setdefault(key, []).append(value.strip())
    ranks = found.pop("r", [])
    targets = found.pop("targets", [])
    if found:
        unknown = next(iter(found))
        hint = near(unknown, ("r", "targets"))
        raise UsageError(f"--lora is {text!r}, and has no {unknown!r}{hint}: {_LORA}")
    if len(ranks) != 1 or not ranks[0].isdecimal() or int(ranks[0]) < 1 or "" in targets:
        raise UsageError(f"--lora is {text!r}: {_LORA}")
    return Lora(int(ranks[0]), tuple(targets))


def _offered(
    lever: Lever, setup: Setup, value: str, option: str, why_not: Callable[[Setup], str]
) -> Option:
    """Return a lever's option of a value.

    Raises:
        UsageError: the lever does not offer it for this run.
    """
    offered = {each.value: each for each in lever.options(setup)}
    if value in offered:
        return offered[value]
    name = type(setup.model).__name__
    if not offered:
        raise UsageError(f"{option} cannot be had for {name}: {why_not(setup)}")
    raise UsageError(
        f"{option} cannot be {value!r} for {name}: it can be {', '.join(map(repr, offered))}"
    )


def _why_not_pure(setup: Setup) -> str:
    return "its parameters are not all in float32, or its window is a function of your own"


def _why_no_lora(setup: Setup) -> str:
    import importlib.util

    from torch import nn

    from autobatch.support.installing import install_line

    if importlib.util.find_spec("peft") is None:
        return f"peft is not installed: {install_line('lora')}"
    if hasattr(setup.model, "peft_config"):
        return "it has adapters of peft already"
    layers = (
        name.rpartition(".")[2]
        for name, module in setup.model.named_modules()
        if type(module) is nn.Linear or type(module).__name__ == "Conv1D"
    )
    known = list(dict.fromkeys(layers))
    if known:
        return (
            "it has no such layers, or an optimizer that is bound to its parameters; its linear "
            f"layers are {listed(known, 8)}"
        )
    return "it has no such layers"


def _why_not_checkpointed(setup: Setup) -> str:
    from autobatch.levers.naming import blocks_in_order

    if blocks_in_order(setup.model):
        return "it is checkpointed already"
    return "no repeated blocks were found in it"


def _note(option: Option) -> str:
    code = _in_one_line(option.code)
    shown = f"`autobatch advise SPEC --levers {option.lever}` shows the code"
    lines = f"`{code}`" if code and len(code) <= _LINE else shown
    return f"with {option.label}: {lines}"


def _in_one_line(code: str) -> str | None:
    r"""Return lines of Python as one; None where a block keeps them from being one.

    >>> _in_one_line("import torch\nmodel = model.to(\n    torch.bfloat16)")
    'import torch; model = model.to(torch.bfloat16)'
    """
    import ast

    statements: list[Any] = ast.parse(code).body
    if any(hasattr(statement, "body") for statement in statements):
        return None
    return "; ".join(map(ast.unparse, statements))
