"""CUDA's autocast policy for a device type that has none of its own.

The lists name the ops as PyTorch's `ATen/autocast_mode.h` does for CUDA: run in the lower
precision, run in fp32, run in fp32 through an optional dtype argument, or promote to the widest
input. Everything else runs in the type it is given.

Invariant: as in CUDA's weight cache, an fp32 leaf that needs a gradient is cast once per autocast
region, and the cast is freed when the outermost region ends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from autobatch.support.patching import patched
from autobatch.support.torch_private import (
    DisableTorchFunction,
    DispatchKeySet,
    ExcludeDispatchKeyGuard,
    FakeTensor,
    parse_dispatch_key,
    torch_version,
    tree_leaves,
    tree_map,
)

__all__ = ["follows_cuda", "inside_an_op", "register"]

_LOWER_PRECISION = """
    _convolution _convolution.deprecated conv1d conv2d conv3d conv_tbc conv_transpose1d
    conv_transpose2d.input conv_transpose3d.input convolution prelu addmm addmv addr matmul einsum
    mm mv linalg_vecdot linear addbmm baddbmm bmm chain_matmul linalg_multi_dot
    _thnn_fused_lstm_cell _thnn_fused_gru_cell lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell
    _scaled_dot_product_flash_attention scaled_dot_product_attention
""".split()

_FP32 = """
    acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan
    pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar softplus layer_norm native_layer_norm rms_norm
    group_norm frobenius_norm.dim nuclear_norm nuclear_norm.dim cosine_similarity poisson_nll_loss
    cosine_embedding_loss nll_loss nll_loss2d hinge_embedding_loss kl_div l1_loss smooth_l1_loss
    huber_loss mse_loss margin_ranking_loss multilabel_margin_loss soft_margin_loss
    triplet_margin_loss multi_margin_loss binary_cross_entropy_with_logits dist pdist cdist renorm
    logsumexp upsample_nearest1d _upsample_nearest_exact1d upsample_nearest2d
    _upsample_nearest_exact2d upsample_nearest3d _upsample_nearest_exact3d upsample_linear1d
    upsample_bilinear2d _upsample_bilinear2d_aa upsample_trilinear3d upsample_bicubic2d
    _upsample_bicubic2d_aa norm.Scalar norm.ScalarOpt_dim
""".split()

_TRANSFORMS = """
    fft_fft fft_ifft fft_fft2 fft_ifft2 fft_fftn fft_ifftn fft_rfft fft_rfft2 fft_rfftn fft_ihfft
""".split()
"""CUDA runs these on bfloat16 in fp32 from PyTorch 2.14 on, perhaps before; older ones fail."""

_FP32_BY_DTYPE = """
    prod prod.dim_int softmax.int log_softmax.int cumprod cumsum linalg_vector_norm
    linalg_matrix_norm linalg_matrix_norm.str_ord sum sum.dim_IntList
""".split()

_PROMOTE = """
    addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot scatter_add
""".split()

_HALVES = (torch.float16, torch.bfloat16)
_UNCAST = frozenset((bool, int, float, str, type(None), torch.dtype, torch.device))
"""Kinds of arguments that hold no tensor."""
_CAST_HAS_A_GRADIENT = torch_version() >= (2, 11)
"""Whether a weight that is cast under `no_grad` and kept can be trained all the same."""


class _Policy:
    """The casts for one device type, and its weight cache.

    Its rules take an op and its arguments, and run the op on what they are cast to.
    """

    def __init__(self, device_type: str):
        self.device_type = device_type
        self.cache: dict[int, tuple[Tensor, Tensor]] = {}

    def cast(self, value: Any, dtype: torch.dtype) -> Any:
        """Return an argument, or what a list or dict of them holds, cast to a dtype."""
        kind = type(value)
        if kind in _UNCAST:
            return value
        if kind is not FakeTensor and not isinstance(value, Tensor):
            return tree_map(lambda leaf: self._cast(leaf, dtype), value)
        return self._cast(value, dtype)

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if not self._eligible(value) or value.dtype is dtype:
            return value
        cacheable = (
            dtype is torch.get_autocast_dtype(self.device_type)
            and value.dtype is torch.float32
            and value.requires_grad
            and value.is_leaf
            and not value._is_view()
            and torch.is_autocast_cache_enabled()
        )
        if not cacheable:
            return value.to(dtype)
        if id(value) not in self.cache:
            with torch.set_grad_enabled(torch.is_grad_enabled() or _CAST_HAS_A_GRADIENT):
                self.cache[id(value)] = (value, value.to(dtype))
        return self.cache[id(value)][1]

    def _eligible(self, value: Any) -> bool:
        if not isinstance(value, Tensor):
            return False
        place = value.fake_device if type(value) is FakeTensor else value.device
        return (
            # where a function mode is on, a tensor says that it is on CUDA
            place.type in (self.device_type, "cuda")
            and value.is_floating_point()
            and value.dtype is not torch.float64
        )

    def lower_precision(self, op: Any, args: Any, kwargs: Any) -> Any:
        return self._run(op, args, kwargs, torch.get_autocast_dtype(self.device_type))

    def fp32(self, op: Any, args: Any, kwargs: Any) -> Any:
        return self._run(op, args, kwargs, torch.float32)

    def fp32_by_dtype(self, op: Any, args: Any, kwargs: Any) -> Any:
        position = [argument.name for argument in op._schema.arguments].index("dtype")
        given = args[position] if len(args) > position else kwargs.get("dtype")
        if given is None and self._eligible(args[0]) and args[0].dtype in _HALVES:
            return op(*args[:position], **{**kwargs, "dtype": torch.float32})
        return op(*args, **kwargs)

    def promote(self, op: Any, args: Any, kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype(self.device_type)
        leaves = tree_leaves((args, kwargs))
        if any(self._eligible(leaf) and leaf.dtype is torch.float32 for leaf in leaves):
            dtype = torch.float32
        return self._run(op, args, kwargs, dtype)

    def _run(self, op: Any, args: Any, kwargs: Any, dtype: torch.dtype) -> Any:
        """Run an op on its arguments cast to a dtype, the last one cast first.

        In PyTorch the casts are arguments of one C++ call, which GCC evaluates from right to left;
        those of a list are made in its order (`cached_cast` in `ATen/autocast_mode.h`).
        """
        with DisableTorchFunction():  # nothing of this is a call of the user's
            named = {name: self.cast(value, dtype) for name, value in reversed(kwargs.items())}
            placed = [self.cast(value, dtype) for value in reversed(args)]
        return op(*reversed(placed), **named)


_policies: dict[str, _Policy] = {}
_libraries: list[Any] = []  # a Library unregisters its kernels when it is collected


def register(device_type: str) -> None:
    """Make the policy for a PrivateUse1 device type; once per process."""
    _policies[device_type] = _Policy(device_type)


def _install(policy: _Policy) -> None:
    """Tell the dispatcher of a policy, when something is cast for the first time."""
    if _libraries:
        return
    fallthrough = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    fallthrough.fallback(torch.library.fallthrough_kernel)
    kernels = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")
    _libraries.extend((fallthrough, kernels))
    for names, rule in (
        (_LOWER_PRECISION, policy.lower_precision),
        (_FP32 + _TRANSFORMS * (torch_version() > (2, 12)), policy.fp32),
        (_FP32_BY_DTYPE, policy.fp32_by_dtype),
        (_PROMOTE, policy.promote),
    ):
        for name in names:
            overload = _overload(name)
            if overload is not None:
                kernels.impl(name, _kernel(overload, rule))
    kernels.impl("binary_cross_entropy", _refuse_binary_cross_entropy)


def inside_an_op() -> contextlib.AbstractContextManager[Any]:
    """Return a block in which nothing is cast, as inside of an op that autocast has cast for."""
    keys: Any = [parse_dispatch_key(key) for key in ("AutocastPrivateUse1", "AutocastCUDA")]
    return ExcludeDispatchKeyGuard(DispatchKeySet(keys[0]) | DispatchKeySet(keys[1]))


def _overload(name: str) -> Any:
    """Return the op overload, or None where this version of PyTorch has none of that name."""
    op, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, op, None), overload or "default", None)


def _kernel(op: Any, rule: Callable[[Any, Any, Any], Any]) -> Callable[..., Any]:
    key: Any = parse_dispatch_key("AutocastPrivateUse1")
    autocast_keys = DispatchKeySet(key)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with ExcludeDispatchKeyGuard(autocast_keys):
            return rule(op, args, kwargs)

    return kernel


def _refuse_binary_cross_entropy(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError(
        "binary_cross_entropy is unsafe under autocast on CUDA; use "
        "binary_cross_entropy_with_logits, which combines it with a sigmoid layer"
    )


@contextlib.contextmanager
def follows_cuda(device_type: str) -> Iterator[None]:
    """Let `torch.autocast("cuda")` switch autocast of `device_type` too, and clear its cache."""
    policy = _policies[device_type]
    set_enabled, set_dtype = torch.set_autocast_enabled, torch.set_autocast_dtype
    clear_cache = torch.clear_autocast_cache

    def set_enabled_of_both(*args: Any) -> None:
        if args[-1]:
            _install(policy)
        set_enabled(*args)
        if args[0] == "cuda" or len(args) == 1:  # the older form without a device means CUDA
            set_enabled(device_type, args[-1])

    def set_dtype_of_both(device: str, dtype: torch.dtype) -> None:
        set_dtype(device, dtype)
        if device == "cuda":
            set_dtype(device_type, dtype)

    def clear_both() -> None:
        clear_cache()
        policy.cache.clear()

    with patched(
        torch,
        set_autocast_enabled=set_enabled_of_both,
        set_autocast_dtype=set_dtype_of_both,
        clear_autocast_cache=clear_both,
    ):
        try:
            yield
        finally:
            policy.cache.clear()
