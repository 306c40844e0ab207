"""Every metric of the matrix L[i, j] under its own name.

Five toolkits' "forgetting" disagree in value and sign on the same matrix, so each variant has a name of its own; the
definitions are in forgetting.py and learning.py. An undefined number is None with a reason, never a stand-in.
"""

from __future__ import annotations

from collections.abc import Callable

from mfext.metrics.forgetting import (
    bwt_gem,
    bwt_pairs,
    bystander,
    forgetting_base,
    forgetting_first_last,
    forgetting_max,
    forgetting_max_incl_last,
)
from mfext.metrics.learning import (
    References,
    average,
    average_incremental,
    fwt_gem,
    fwt_raw,
    fwt_vs_independent,
    intransigence_independent,
    intransigence_joint,
    learned,
)
from mfext.metrics.metric_value import MetricValue
from mfext.metrics.transfer_matrix import TransferMatrix

METRICS: tuple[Callable[[TransferMatrix], MetricValue], ...] = (
    forgetting_base,
    forgetting_first_last,
    forgetting_max,
    forgetting_max_incl_last,
    bwt_gem,
    bwt_pairs,
    fwt_gem,
    fwt_raw,
    learned,
    bystander,
    average,
    average_incremental,
)
REFERENCE_METRICS: tuple[Callable[[TransferMatrix, References], MetricValue], ...] = (
    fwt_vs_independent,
    intransigence_joint,
    intransigence_independent,
)
NO_REFERENCES = References()


def measure(matrix: TransferMatrix, references: References = NO_REFERENCES) -> dict[str, MetricValue]:
    """Every metric of the matrix by its name (`forgetting.base`, `bwt.gem`, `intransigence.joint`, ...)."""
    values = [metric(matrix) for metric in METRICS]
    values += [metric(matrix, references) for metric in REFERENCE_METRICS]
    return {value.name: value for value in values}
