"""The torchmetrics classes agree with the ledger's numbers, in one process and in several."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mfext.errors import InputError
from mfext.metrics.forgetting import forgetting_base
from mfext.metrics.ledger import bits_per_byte
from mfext.metrics.torch_metrics import BitsPerByte, Forgetting
from mfext.metrics.transfer_matrix import TransferMatrix


def two_processes(state: Tensor, group: object) -> list[Tensor]:
    """Stands for an all-gather in which the other process holds three times our sums."""
    return [state, state * 3]


def test_bits_per_byte_divides_sums_and_not_means() -> None:
    metric = BitsPerByte()
    metric.update(10.0, 1)
    metric.update(torch.tensor([4.0, 6.0], requires_grad=True), torch.tensor([39, 60]))
    assert float(metric.compute()) == pytest.approx(bits_per_byte(20.0, 100))
    metric.reset()
    metric.update(torch.tensor(math.log(2)), 1)
    assert float(metric.compute()) == pytest.approx(1.0)
    assert not metric.compute().requires_grad


def test_small_losses_are_not_lost_in_a_long_sum() -> None:
    metric = BitsPerByte()
    metric.update(1e8, 1)
    for _ in range(100):
        metric.update(torch.tensor(0.5), 0)
    assert float(metric.nats) == 1e8 + 50


def test_sums_are_reduced_over_processes() -> None:
    metric = BitsPerByte()
    metric.update(2.0, 5)
    with metric.sync_context(dist_sync_fn=two_processes, distributed_available=lambda: True):
        assert (float(metric.nats), float(metric.num_bytes)) == (8.0, 20.0)
    forgetting = Forgetting(2)
    forgetting.update(1, 1.0, 3.0, 4)
    with forgetting.sync_context(dist_sync_fn=two_processes, distributed_available=lambda: True):
        assert forgetting.change_nats.tolist() == [0.0, 8.0] and forgetting.num_bytes.tolist() == [0.0, 16.0]


def test_forgetting_is_forgetting_base_in_bits() -> None:
    before, after, sizes = (8.0, 30.0), (9.0, 33.0), (4, 10)
    metric = Forgetting(num_domains=2)
    for domain in range(2):
        for _ in range(3):
            metric.update(
                domain, before[domain] / 3, torch.tensor(after[domain], dtype=torch.float64) / 3, sizes[domain] / 3
            )
    rows = tuple(tuple(nats / size for nats, size in zip(row, sizes, strict=True)) for row in (before, after))
    nats = forgetting_base(TransferMatrix(("base", "new"), ("a", "b"), rows, {"a": 0, "b": 0})).value
    assert nats is not None
    assert float(metric.compute()) == pytest.approx(nats / math.log(2))


def test_domains_without_text_are_left_out_and_nothing_is_nan() -> None:
    metric = Forgetting(num_domains=3)
    metric.update(2, 4.0, 5.0, 2)
    assert float(metric.compute()) == pytest.approx(0.5 / math.log(2))


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
def test_before_the_first_text_both_are_nan() -> None:
    assert math.isnan(float(BitsPerByte().compute())) and math.isnan(float(Forgetting().compute()))


def test_a_domain_that_does_not_exist_is_one_clear_error() -> None:
    with pytest.raises(InputError, match=r"domain=3.*0 to 1"):
        Forgetting(2).update(3, 1.0, 1.0, 1)
    with pytest.raises(InputError, match="num_domains=0"):
        Forgetting(0)
