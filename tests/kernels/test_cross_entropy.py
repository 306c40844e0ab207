"""Cross-entropy of logits off the GPU is torch's; its kernels are tested in interpreted_cross_entropy.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mfext_kernels.cross_entropy import cross_entropy


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_it_is_torchs_in_at_least_fp32(dtype: torch.dtype) -> None:
    logits, targets = torch.randn(7, 11, dtype=dtype), torch.tensor([0, 10, -100, 3, 3, -100, 9])
    exact = logits if dtype == torch.float64 else logits.float()
    assert torch.equal(cross_entropy(logits, targets), F.cross_entropy(exact, targets))


@pytest.mark.parametrize(
    ("logits", "targets"),
    [
        (torch.zeros(3, 4, 5), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(3, 4), torch.zeros(4, dtype=torch.int64)),
        (torch.zeros(3, 4), torch.zeros(3)),
    ],
)
def test_other_shapes_and_dtypes_are_refused(logits: torch.Tensor, targets: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="must be"):
        cross_entropy(logits, targets)
