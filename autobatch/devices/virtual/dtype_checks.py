"""Dtypes that eager PyTorch refuses and fake kernels do not check.

What CUDA's kernels demand is in a table where CPU kernels demand less or other things. All other
ops on mixed dtypes, or on whole numbers, run once for each kind on small real tensors.

Invariant: a call that the user's card accepts is never refused because of sizes or values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autobatch.support.torch_private import OpOverload, tree_map

__all__ = ["check_dtypes"]

_PRODUCTS = frozenset("mm addmm bmm baddbmm addbmm mv addmv dot vdot convolution".split())
_ONE_DTYPE = _PRODUCTS | {"native_layer_norm", "native_group_norm"}
"""Ops of which CUDA's kernels want all tensors in one floating dtype."""

_OF_DTYPES = re.compile(
    r"dtype|data type|scalar type|same type|can't be cast|must be (long|tensors)"
)
_OF_WHOLE_NUMBERS = re.compile(r"not implemented for '(Long|Int|Short|Char|Byte|Bool)'")
"""What CPU kernels say where CUDA's refuse as well; half floats are better supported there."""

_seen: set[Any] = set()


def check_dtypes(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise what PyTorch raises if an op's kernels do not take tensors of these dtypes.

    Raises:
        RuntimeError: they do not.
    """
    dtypes = tuple(arg.dtype for arg in args if isinstance(arg, Tensor))
    key = func, dtypes
    if key in _seen:
        return
    _require(func, dtypes, args, kwargs)
    _seen.add(key)  # where it raised, it will again


def _require(
    func: OpOverload,
    dtypes: tuple[torch.dtype, ...],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> None:
    kinds = list(dict.fromkeys(dtypes))
    name = func._opname
    is_plain = len(kinds) == 1 and kinds[0].is_floating_point
    if not kinds or (is_plain and not _BY_INDEX.match(name)):
        return
    if name in _ONE_DTYPE and func._overloadname == "default":
        if len(kinds) > 1:
            named = " and ".join(map(str, kinds))
            raise RuntimeError(f"expected all tensors of {name} to have one dtype, but got {named}")
        if not (kinds[0].is_floating_point or kinds[0].is_complex):
            raise RuntimeError(f'"{name}_cuda" is not implemented for {kinds[0]}')
        return
    if _can_run(func):
        _try(func, args, kwargs)


_TRIED = re.compile(
    r".*(nll|mse|l1|smooth|huber|glu|entropy|margin|kl_div|softplus|softmax|batch_norm|pool|upsample).*"
    r"|embedding|(gather|scatter|take|where|lerp|cat|stack).*|index_(select|add|copy|fill)|.*_loss"
)
_BY_INDEX = re.compile("embedding|gather|scatter|take|index_|nll_loss")
_TAGS = frozenset((torch.Tag.pointwise, torch.Tag.reduction))


def _can_run(func: OpOverload) -> bool:
    """Whether an op can be tried: no other tells its kernel where to read."""
    name = func._opname.removesuffix("_").removesuffix("_forward").removesuffix("_backward")
    return (
        func.namespace == "aten"
        and all(argument.name not in ("device", "generator") for argument in func._schema.arguments)
        and torch.Tag.nondeterministic_seeded not in func.tags
        and "ctc" not in name
        and func._opname != "native_batch_norm_backward"  # CUDA saves float32 of halves
        and (not _TAGS.isdisjoint(func.tags) or _TRIED.fullmatch(name) is not None)
    )


def _try(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Run an op on the CPU, on two elements in each dimension."""
    try:
        tiny_args, tiny_kwargs = tree_map(_tiny, (list(args), dict(kwargs)))
        with torch.no_grad():
            func(*tiny_args, **tiny_kwargs)
    except RuntimeError as error:
        said = str(error).splitlines()[0]
        if _OF_WHOLE_NUMBERS.search(said) or (
            "not implemented for" not in said and _OF_DTYPES.search(said)
        ):
            raise RuntimeError(said) from None
    except (IndexError, NotImplementedError, TypeError, ValueError):
        pass  # about sizes and values, which are not the real ones


def _tiny(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.zeros([2] * value.dim(), dtype=value.dtype)
