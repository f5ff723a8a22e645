"""Inputs of torchvision's models, told by the module in which a model's class lives."""

from __future__ import annotations

from torch import Tensor, nn

from autobatch.workload.infer.dry_run import first_that_runs
from autobatch.workload.infer.fields import Field, Inferred, builder, float_dtype, pair, unknown
from autobatch.workload.infer.images import classification, cross_entropy, last_features

__all__ = ["infer_torchvision"]

IMAGE_SIZE = 224
INCEPTION_SIZE = 299
SEGMENTATION_SIZE = 480
CLIP_SIZE = 112
CLIP_FRAMES = 16


def infer_torchvision(model: nn.Module, image_size: int | None) -> Inferred:
    """Return images or clips with one class each, or images with a class for every pixel.

    Raises:
        SampleError: the model takes more than images, as a detector does.
    """
    module, dtype = type(model).__module__, float_dtype(model)
    if ".detection" in module or ".optical_flow" in module:
        raise unknown(model, "it takes more than a batch of images: use a Workload")
    side = image_size or getattr(model, "image_size", None)
    if ".segmentation" in module:
        height, width = pair(side or SEGMENTATION_SIZE)
        images = Field((3, height, width), dtype)
        classes = last_features(getattr(model, "classifier", None))
        return Inferred(
            batch=builder((images, Field((height, width), high=max(classes, 1)))),
            loss=cross_entropy,
            inputs_note=f"inputs inferred: images {images} for a torchvision segmentation model",
            loss_note=f"loss inferred: cross entropy of every pixel over {classes} classes",
        )
    if ".video" in module:
        side = side or (CLIP_SIZE if type(model).__name__ == "VideoResNet" else IMAGE_SIZE)
        shape: tuple[int, ...] = (3, CLIP_FRAMES, *pair(side))
    else:
        side = side or (INCEPTION_SIZE if type(model).__name__ == "Inception3" else IMAGE_SIZE)
        shape = (3, *pair(side))
    images = Field(shape, dtype)
    _, output = first_that_runs(model, [images])
    main = output[0] if isinstance(output, tuple) else output
    classes = main.shape[1] if isinstance(main, Tensor) and main.dim() == 2 else 0
    sizes = " x ".join(str(size) for size in shape)
    return classification(images, classes, f"{sizes} for a torchvision model")
