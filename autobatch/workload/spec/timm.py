"""Models of timm, by name."""

from __future__ import annotations

from typing import Any

from torch import nn

from autobatch.errors import SpecError
from autobatch.support.wording import near
from autobatch.workload.infer.infer import infer
from autobatch.workload.spec.library import Options, import_library, on_meta, rejected
from autobatch.workload.workload import Workload

__all__ = ["load_timm"]


def load_timm(name: str, options: Options) -> Workload:
    """Build a model of timm on `meta`, with the inputs that are inferred.

    Raises:
        SpecError: there is no such model, or it does not take these options.
        SampleError: its inputs cannot be inferred.
    """
    timm = import_library("timm", "timm")
    options.refuse_downloads()
    if not timm.is_model(name):
        raise SpecError(f"timm has no model {name!r}{near(name.lower(), timm.list_models())}")
    dtype, size = options.take_dtype(), options.take_size("img_size")
    if size:
        options["img_size"] = size

    def build(**options: Any) -> nn.Module:
        return on_meta(lambda: timm.create_model(name, pretrained=False, **options))

    try:
        try:
            model = build(**options)
        except TypeError as error:
            if "'img_size'" not in str(error):
                raise
            # Convolutional networks take images of any size and no such option.
            del options["img_size"]
            model = build(**options)
    except Exception as error:
        raise rejected(f"timm:{name}", options, error) from error
    model = model.to(dtype) if dtype else model
    return infer(model, image_size=size).workload(model)
