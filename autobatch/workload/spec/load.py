"""A model named by one string, as on the command line.

Invariant: loading a SPEC downloads nothing. Library models get random weights, on the `meta`
device wherever their construction allows it, so that seventy billion parameters cost nothing.

    file.py:function             a function in a file, without arguments, that returns a model
    package.module:function      or a Workload (a module or Workload itself will do)
    timm:resnet50?num_classes=10&img_size=384
    torchvision:resnet50
    hf:gpt2?seq=1024&n_layer=24  a transformers model type, or a folder or file with its config
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from autobatch.workload.infer.fields import Inferred
from autobatch.workload.spec.options import parsed
from autobatch.workload.spec.timm import load_timm
from autobatch.workload.spec.torchvision import load_torchvision
from autobatch.workload.spec.transformers import load_transformers
from autobatch.workload.spec.user_code import load_function
from autobatch.workload.workload import Workload

__all__ = ["LoadedSpec", "load_spec"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedSpec:
    """What a SPEC stands for: a model or a Workload, never both.

    Attributes:
        name: the SPEC as the user wrote it, for display.
        model: the model; None where the function returned a Workload.
        workload: the Workload; None where there is a model.
        inputs: a library model's inputs and loss; None for a user's function.
    """

    name: str
    model: nn.Module | None = None
    workload: Workload | None = None
    inputs: Inferred | None = None

    @property
    def subject(self) -> nn.Module | Workload:
        """What to hand to `tune`; a library model keeps the inputs that its options ask for."""
        if self.workload is not None:
            return self.workload
        assert self.model is not None
        return self.model if self.inputs is None else self.inputs.workload(self.model)


def load_spec(spec: str) -> LoadedSpec:
    """Build the model or Workload that a SPEC names.

    The folder of a file, or the current folder for a module, is on `sys.path` while the code is
    imported and the function runs. Options after `?` go to timm's and torchvision's model
    functions; for `hf:` they override attributes of the config. Common options: `dtype=bf16`
    (of the parameters); `img_size` for timm and torchvision; `seq` and `head` (such as causal-lm or
    base) for `hf:`.

    Raises:
        SpecError: the SPEC names no file, module, function or model, or an option is unknown.
        SampleError: the inputs of a library model cannot be inferred.
        WorkloadError: the user's own code raised; the original error is chained.
    """
    prefix, colon, rest = spec.partition(":")
    loaders = {"timm": load_timm, "torchvision": load_torchvision, "hf": load_transformers}
    if colon and prefix in loaders:
        name, _, query = rest.partition("?")
        model, inputs = loaders[prefix](name, parsed(spec, query))
        return LoadedSpec(name=spec, model=model, inputs=inputs)
    made = load_function(spec)
    if isinstance(made, Workload):
        return LoadedSpec(name=spec, workload=made)
    return LoadedSpec(name=spec, model=made)
