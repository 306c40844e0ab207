"""Stick-breaking attention: contract and choice of implementation.

    l_ij = q_i.k_j / sqrt(C)      a_ij = sigmoid(l_ij) * prod_{m=j+1..i} (1 - sigmoid(l_im))      o_i = sum_j a_ij v_j

Shapes: B batch, T queries, S keys (S >= T: query t sits at key index S-T+t), K chosen experts, H heads,
C head width. The K experts' queries share keys and values. Key j is visible to query i if
starts[b, t] <= j <= i; `starts` are key indices, None means 0. A query whose start lies behind it gives
exact zeros. Source: arXiv 2306.04640, section 3. fp32, float64; bf16 is computed in fp32. On CUDA (fp32, fp16, bf16)
sums are fp32, and weights meet values in the inputs' dtype; heads up to WIDEST_HEAD_BYTES are held in registers
(triton.py), wider ones go through torch's products (wide_heads.py).
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from mfext_kernels.backends import Backend, choose
from mfext_kernels.stickbreaking import cpu, reference

WIDEST_HEAD_BYTES = 512  # in registers, on a GPU


def stickbreaking_attention(
    q_BTKHC: Tensor, k_BSHC: Tensor, v_BSHC: Tensor, starts_BT: Tensor | None = None, backend: Backend | None = None
) -> Tensor:
    """Attend T queries per row to S shared keys and values -> o_BTKHC. Memory is linear in S, never T * T."""
    batch, length, _, heads, width = _check_queries(q_BTKHC, 5)
    _check_keys(k_BSHC, v_BSHC, batch, heads, width)
    if k_BSHC.shape[1] < length:
        raise ValueError(
            f"k_BSHC: {k_BSHC.shape[1]} keys for {length} queries; at least as many keys as queries are needed"
        )
    if starts_BT is not None and starts_BT.shape != (batch, length):
        raise ValueError(f"starts_BT: must be ({batch}, {length}), not {tuple(starts_BT.shape)}")
    q_BTKHC, k_BSHC, v_BSHC = _same_dtype(q_BTKHC, k_BSHC, v_BSHC)
    o_BTKHC: Tensor = _implementation(backend, q_BTKHC).stickbreaking_attention(q_BTKHC, k_BSHC, v_BSHC, starts_BT)
    return o_BTKHC


def stickbreaking_decode(
    q_BKHC: Tensor,
    k_BSHC: Tensor,
    v_BSHC: Tensor,
    starts_B: Tensor | None = None,
    backend: Backend | None = None,
    ends_B: Tensor | None = None,
) -> Tensor:
    """Attend one new position per row -> o_BKHC; its own key is the last of the S, or the one before `ends_B`.

    With `ends_B`, known to the device alone, the keys are a cache's whole room, what is not filled yet in zeros: a
    recorded step's shapes then stay the same. It has no gradient.
    """
    batch, _, heads, width = _check_queries(q_BKHC, 4)
    _check_keys(k_BSHC, v_BSHC, batch, heads, width)
    if starts_B is not None and starts_B.shape != (batch,):
        raise ValueError(f"starts_B: must be ({batch},), not {tuple(starts_B.shape)}")
    if ends_B is not None and ends_B.shape != (batch,):
        raise ValueError(f"ends_B: must be ({batch},), not {tuple(ends_B.shape)}")
    if ends_B is not None and torch.is_grad_enabled() and any(each.requires_grad for each in (q_BKHC, k_BSHC, v_BSHC)):
        raise ValueError("ends_B: is for decoding alone and has no gradient; call it under torch.no_grad()")
    q_BKHC, k_BSHC, v_BSHC = _same_dtype(q_BKHC, k_BSHC, v_BSHC)
    o_BKHC: Tensor = _implementation(backend, q_BKHC).stickbreaking_decode(q_BKHC, k_BSHC, v_BSHC, starts_B, ends_B)
    return o_BKHC


def stickbreaking_decode_folded(q_XKC: Tensor, k_XSC: Tensor, v_XSC: Tensor) -> Tensor:
    """`stickbreaking_decode` without gradients, starts or checks, for X (batch, head) pairs -> o_XKC."""
    o_XKC: Tensor = _implementation(None, q_XKC).decode_folded(q_XKC, k_XSC, v_XSC)
    return o_XKC


def _implementation(backend: Backend | None, queries: Tensor) -> ModuleType:
    chosen = choose(backend, queries)
    if chosen == "triton":
        from mfext_kernels.stickbreaking import triton, wide_heads

        return triton if queries.shape[-1] * queries.element_size() <= WIDEST_HEAD_BYTES else wide_heads
    return reference if chosen == "reference" else cpu


def _check_queries(queries: Tensor, dimensions: int) -> torch.Size:
    if queries.dim() != dimensions:
        raise ValueError(f"q: must have {dimensions} dimensions, not shape {tuple(queries.shape)}")
    return queries.shape


def _check_keys(k_BSHC: Tensor, v_BSHC: Tensor, batch: int, heads: int, width: int) -> None:
    if (
        k_BSHC.dim() != 4
        or (k_BSHC.shape[0], k_BSHC.shape[2], k_BSHC.shape[3]) != (batch, heads, width)
        or v_BSHC.shape != k_BSHC.shape
    ):
        raise ValueError(
            f"k, v: must both be ({batch}, S, {heads}, {width}), not {tuple(k_BSHC.shape)} and {tuple(v_BSHC.shape)}"
        )


def _same_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast (or mixed inputs) the three may differ; the widest wins."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(tensor.to(dtype) for tensor in tensors)
