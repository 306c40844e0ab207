"""The published conventions and toolkits, each by its own formula and sign, against the metric named here for it.

All of them are stated for accuracies a[i][j] (or R[i][j]): after task i on task j, tasks numbered 0 .. T-1, higher is
better. A loss is -a. Each test writes the convention's formula out on a, then says which named metric equals it and
with which sign. Toolkits go by their released code.
"""

from __future__ import annotations

from itertools import pairwise

import pytest

from mfext.metrics.forgetting import bwt_gem, bwt_pairs, forgetting_first_last, forgetting_max, forgetting_max_incl_last
from mfext.metrics.learning import (
    References,
    average,
    average_incremental,
    fwt_gem,
    fwt_raw,
    fwt_vs_independent,
    intransigence_independent,
    intransigence_joint,
)
from mfext.metrics.transfer import measure
from tests.metrics.rows import task_stream

# After task 0, 1, 2, 3; on task 0, 1, 2, 3. Task 0 is best after task 1, task 1 is best at the very end.
A = (
    (0.875, 0.250, 0.125, 0.500),
    (0.9375, 0.750, 0.375, 0.250),
    (0.500, 0.625, 0.8125, 0.375),
    (0.625, 0.875, 0.250, 0.6875),
)
UNTRAINED = (0.125, 0.1875, 0.25, 0.0625)
T = len(A)
MATRIX = task_stream(A, UNTRAINED)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_gem_paper() -> None:
    """Lopez-Paz and Ranzato 2017: ACC, BWT and FWT (b: accuracies at random initialisation)."""
    acc = mean([A[T - 1][j] for j in range(T)])
    bwt = mean([A[T - 1][j] - A[j][j] for j in range(T - 1)])
    fwt = mean([A[j - 1][j] - UNTRAINED[j] for j in range(1, T)])
    assert average(MATRIX).value == pytest.approx(-acc)
    assert bwt_gem(MATRIX).value == pytest.approx(bwt)
    assert fwt_gem(MATRIX).value == pytest.approx(fwt)


def test_gem_code_divides_by_all_tasks() -> None:
    """GradientEpisodicMemory, metrics.py: both transfers are means over T terms, of which one is always 0."""
    bwt = mean([A[T - 1][j] - A[j][j] for j in range(T)])
    fwt = mean([0.0, *(A[j - 1][j] - UNTRAINED[j] for j in range(1, T))])
    values = {name: value.value for name, value in measure(MATRIX).items() if value.value is not None}
    assert values["bwt.gem"] * (T - 1) / T == pytest.approx(bwt)
    assert values["fwt.gem"] * (T - 1) / T == pytest.approx(fwt)


def test_chaudhry_forgetting() -> None:
    """Chaudhry et al. 2018: F_k = mean over j < k of max over l < k of a[l][j], minus a[k][j].

    The maximum begins at stage 0 here, the paper's at the first task; they agree where training a task is what made
    it best, as it is in this matrix.
    """
    forgetting = mean([max(A[stage][j] for stage in range(T - 1)) - A[T - 1][j] for j in range(T - 1)])
    assert forgetting_max(MATRIX).value == pytest.approx(forgetting)
    assert forgetting_max(MATRIX).domains["task1"] < 0  # best at the end: the paper's range is [-1, 1]


def test_chaudhry_intransigence() -> None:
    """Chaudhry et al. 2018: I_k = a*_k - a[k][k], a*: a model trained on all data up to task k jointly."""
    joint, alone = (0.9375, 0.875, 0.75, 0.8125), (0.875, 0.8125, 0.875, 0.75)
    references = References(*({f"task{j}": -each[j] for j in range(T)} for each in (joint, alone)))
    intransigence = mean([joint[k] - A[k][k] for k in range(T)])
    assert intransigence_joint(MATRIX, references).value == pytest.approx(intransigence)
    against_alone = mean([alone[k] - A[k][k] for k in range(T)])
    assert intransigence_independent(MATRIX, references).value == pytest.approx(against_alone)


def test_wang_survey_forward_transfer() -> None:
    """Wang et al. 2023: FWT = mean over j >= 1 of a[j][j] - the accuracy of a model trained on j alone."""
    alone = (0.875, 0.8125, 0.875, 0.75)
    references = References(independent={f"task{j}": -alone[j] for j in range(T)})
    assert fwt_vs_independent(MATRIX, references).value == pytest.approx(
        mean([A[j][j] - alone[j] for j in range(1, T)])
    )


def test_avalanche_experience_and_stream_forgetting() -> None:
    """Avalanche, forgetting_bwt.py: per experience initial minus last accuracy, where it was met again.

    The stream's number is the mean over experiences; the last was met once and has none. BWT is the negative.
    """
    experience = {f"task{j}": A[j][j] - A[T - 1][j] for j in range(T - 1)}
    value = forgetting_first_last(MATRIX)
    assert value.domains == pytest.approx(experience)
    assert value.value == pytest.approx(mean(list(experience.values())))
    assert bwt_gem(MATRIX).value == pytest.approx(-mean(list(experience.values())))


def test_mammoth() -> None:
    """Mammoth, metrics.py: forgetting's maximum includes the last task; both transfers are means over T - 1 tasks.

    Mammoth fills a[l][j] for j > l with 0, which cannot be the maximum of accuracies.
    """
    forgetting = mean([max(A[stage][j] for stage in range(j, T)) - A[T - 1][j] for j in range(T - 1)])
    assert forgetting_max_incl_last(MATRIX).value == pytest.approx(forgetting)
    assert forgetting_max_incl_last(MATRIX).domains["task1"] == 0.0
    assert bwt_gem(MATRIX).value == pytest.approx(mean([A[T - 1][j] - A[j][j] for j in range(T - 1)]))
    assert fwt_gem(MATRIX).value == pytest.approx(mean([A[j - 1][j] - UNTRAINED[j] for j in range(1, T)]))


def test_diaz_rodriguez_backward_transfer_counts_all_pairs() -> None:
    """Diaz-Rodriguez et al. 2018: BWT = sum over i > j of R[i][j] - R[j][j], divided by T (T - 1) / 2."""
    total = sum(A[i][j] - A[j][j] for i in range(1, T) for j in range(i))
    value = bwt_pairs(MATRIX)
    assert value.value == pytest.approx(total / (T * (T - 1) / 2))
    assert len(value.domains) == T * (T - 1) // 2
    assert value.domains["task0 after stage 2"] == pytest.approx(A[1][0] - A[0][0])


def test_continuum_backward_transfer_and_forgetting_skip_pairs() -> None:
    """Continuum, metrics.py: `range(0, i - 1)` leaves the pairs (i, i-1) out of BWT but still divides by all pairs;
    its forgetting leaves the last two tasks out but still divides by T - 1, and stops its maximum before task T - 2.

    Neither is a mean of what it sums, so neither has a name here; from the terms of the named ones they are:
    """
    terms = bwt_pairs(MATRIX).domains
    skipped = [terms[f"task{j} after stage {i + 1}"] for i in range(1, T) for j in range(i - 1)]
    continuum_bwt = sum(A[i][j] - A[j][j] for i in range(1, T) for j in range(i - 1)) / (T * (T - 1) / 2)
    assert sum(skipped) / len(terms) == pytest.approx(continuum_bwt)
    maxima = [max(A[stage][j] for stage in range(T - 2) if stage >= j) for j in range(T - 2)]
    continuum_forgetting = sum(best - A[T - 1][j] for j, best in enumerate(maxima)) / (T - 1)
    kept = forgetting_max(MATRIX).domains
    assert (kept["task0"] + kept["task1"]) / (T - 1) == pytest.approx(continuum_forgetting)


def test_sequoia_final_performance() -> None:
    """Sequoia, incremental_results.py: average final performance is the mean of the transfer matrix's last row."""
    assert average(MATRIX).value == pytest.approx(-mean(list(A[T - 1])))


def test_icarl_and_pycil_average_incremental_accuracy() -> None:
    """Rebuffi et al. 2017, PyCIL ("Average Accuracy (CNN)"): mean over tasks of the accuracy on everything seen so far.

    With tasks of equal size, since they pool the test samples of all classes seen.
    """
    curve = [mean([A[i][j] for j in range(i + 1)]) for i in range(T)]
    assert average_incremental(MATRIX).value == pytest.approx(-mean(curve))
    assert list(average_incremental(MATRIX).domains) == ["stage 1", "stage 2", "stage 3", "stage 4"]


def test_zero_shot_without_a_baseline() -> None:
    """Diaz-Rodriguez et al. 2018 average R above the diagonal without a baseline; `fwt.raw` the cells next to it."""
    zero_shot = [A[i][j] for i, j in pairwise(range(T))]
    assert fwt_raw(MATRIX).value == pytest.approx(-mean(zero_shot))


def test_the_conventions_really_differ_on_this_matrix() -> None:
    names = ("forgetting.first_last", "forgetting.max", "forgetting.max_incl_last", "bwt.gem", "bwt.pairs")
    values = {measure(MATRIX)[name].value for name in names}
    assert len(values) == len(names)
