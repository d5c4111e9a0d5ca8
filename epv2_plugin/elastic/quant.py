"""FP8 casts with one scale factor per token and 128 values, as DeepSeek-V3 trains (arXiv 2412.19437, section 3.3)."""

from __future__ import annotations

import torch

from epv2_plugin.elastic.sizing import FP8_BLOCK, align

E4M3_MAX = 448.0
_SMALLEST_AMAX = 1e-4  # keeps the scale factor of an all-zero block finite


def per_token_cast_to_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cast `x` `[T, H]` (fp32 / bf16 / fp16) to e4m3.

    Returns:
        `x_fp8` `[T, H]` float8_e4m3fn and `scales` `[T, ceil(H / 128)]` fp32, with x ~ x_fp8 * scale. The same bits as
        csrc/kernels/ep/dispatch_stage.cu, which casts on the way: one division per block, a product per value.
    """
    tokens, hidden = x.shape
    wide = align(hidden, FP8_BLOCK)
    padded = torch.nn.functional.pad(x.float(), (0, wide - hidden)).view(tokens, wide // FP8_BLOCK, FP8_BLOCK)
    amax = padded.abs().amax(dim=2).clamp(min=_SMALLEST_AMAX)
    # Two tensors: what torch divides by or into a Python number, it multiplies with a reciprocal, rounded twice
    # (`c / x` everywhere, `x / c` on CUDA).
    largest = torch.full_like(amax, E4M3_MAX)
    factor = largest / amax
    quantized = (padded * factor.unsqueeze(2)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return quantized.view(tokens, wide)[:, :hidden].contiguous(), amax / largest


def per_token_cast_back(x_fp8: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `per_token_cast_to_fp8`.

    Args:
        x_fp8: `[R, H]` float8_e4m3fn.
        scales: `[R, ceil(H / 128)]` fp32, or `[R, ceil(H / 512)]` int32 of four UE8M0 exponents each.
        dtype: of the result.
    """
    hidden = x_fp8.shape[1]
    if scales.dtype == torch.int32:
        exponents = scales.contiguous().view(torch.uint8)[:, : align(hidden, FP8_BLOCK) // FP8_BLOCK]
        scales = (exponents.to(torch.int32) << 23).view(torch.float32)
    wide = scales.repeat_interleave(FP8_BLOCK, dim=1)[:, :hidden]
    return (x_fp8.float() * wide).to(dtype)
