"""Models of torchvision, by name."""

from __future__ import annotations

import inspect

from autobatch.errors import SpecError
from autobatch.support.wording import near
from autobatch.workload.infer.infer import infer
from autobatch.workload.spec.library import Options, import_library, on_meta, rejected
from autobatch.workload.workload import Workload

__all__ = ["load_torchvision"]


def load_torchvision(name: str, options: Options) -> Workload:
    """Build a model of torchvision on `meta`, with the inputs that are inferred.

    Raises:
        SpecError: there is no such model, or it does not take these options.
        SampleError: its inputs cannot be inferred.
    """
    models = import_library("torchvision", "timm").models
    options.refuse_downloads()
    if name not in models.list_models():
        raise SpecError(
            f"torchvision has no model {name!r}{near(name.lower(), models.list_models())}"
        )
    dtype, size = options.take_dtype(), options.take_size("img_size")
    # A backbone's weights would be downloaded by default.
    takes = inspect.signature(models.get_model_builder(name)).parameters
    offline = {key: None for key in ("weights", "weights_backbone") if key in takes}
    try:
        model = on_meta(lambda: models.get_model(name, **offline, **options))
    except Exception as error:
        raise rejected(f"torchvision:{name}", options, error) from error
    model = model.to(dtype) if dtype else model
    return infer(model, image_size=size).workload(model)
