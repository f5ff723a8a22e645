"""Models of timm, by name."""

from __future__ import annotations

from typing import Any

from torch import nn

from autobatch.errors import SpecError
from autobatch.workload.infer.fields import Inferred
from autobatch.workload.infer.infer import infer
from autobatch.workload.spec.building import import_library, on_meta, rejected
from autobatch.workload.spec.options import Options, refuse_downloads, take_dtype, take_size
from autobatch.workload.spec.wording import near

__all__ = ["load_timm"]


def load_timm(name: str, options: Options) -> tuple[nn.Module, Inferred]:
    """Build a model of timm on `meta`, and infer its inputs.

    Raises:
        SpecError: there is no such model, or it does not take these options.
        SampleError: its inputs cannot be inferred.
    """
    timm = import_library("timm", "timm")
    refuse_downloads(options)
    if not timm.is_model(name):
        raise SpecError(f"timm has no model {name!r}{near(name, timm.list_models())}")
    dtype, size = take_dtype(options), take_size(options, "img_size")
    if size:
        options["img_size"] = size

    def build(**options: Any) -> nn.Module:
        return on_meta(lambda: timm.create_model(name, pretrained=False, **options))

    try:
        model = build(**options)
    except TypeError as error:
        if "'img_size'" not in str(error):
            raise rejected(f"timm:{name}", options, error) from error
        # Convolutional networks take images of any size and no such option.
        del options["img_size"]
        try:
            model = build(**options)
        except Exception as second:
            raise rejected(f"timm:{name}", options, second) from second
    except Exception as error:
        raise rejected(f"timm:{name}", options, error) from error
    model = model.to(dtype) if dtype else model
    return model, infer(model, image_size=size)
