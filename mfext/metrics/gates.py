"""How well each generation's domain gate tells its own domain from what came before it.

A gate g is 0 where its generation stays out of a token and 1 where it takes full part. "Old" domains of a generation
are those first trained before its stage, except its own; bystanders and later domains are neither old nor own.
Terms are keyed "GENERATION on DOMAIN".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mfext.metrics.details import DomainDetails, GateShares
from mfext.metrics.metric_value import LOWER, MetricValue, mean_of

NO_GATE = "no generation has a domain gate"
NO_OLD = "no domain was trained before a gated generation"
NO_OWN = "no gated generation has a domain of its own"
MISSING = "the gate was not measured for"


@dataclass(frozen=True)
class GatedGeneration:
    """A generation with a gate: `gate` counts gated generations from 0 (GateUsage.gate), `stage` is where it grew."""

    gate: int
    name: str
    domains: tuple[str, ...]
    stage: int


@dataclass(frozen=True)
class GateMeasurements:
    """The details of one stage, its gated generations, and the first stage every domain was trained in (None: never).

    A generation that grew after the stage measured has no place here.
    """

    details: Mapping[str, DomainDetails]
    generations: Sequence[GatedGeneration]
    first_stage: Mapping[str, int | None]

    def of_old(self) -> dict[str, GateShares | None]:
        """Every gate on every domain trained before its generation."""
        return {f"{each.name} on {j}": self._shares(each, j) for each in self.generations for j in self._old(each)}

    def of_own(self) -> dict[str, GateShares | None]:
        """Every gate on the domains of its own generation."""
        return {f"{each.name} on {j}": self._shares(each, j) for each in self.generations for j in each.domains}

    def _old(self, generation: GatedGeneration) -> Iterator[str]:
        for domain, stage in self.first_stage.items():
            if stage is not None and stage < generation.stage and domain not in generation.domains:
                yield domain

    def _shares(self, generation: GatedGeneration, domain: str) -> GateShares | None:
        gates = self.details.get(domain, DomainDetails()).gates
        return next((each for each in gates if each.gate == generation.gate), None)


def gate_false_open(measured: GateMeasurements) -> MetricValue:
    """Mean over generations and their old domains of the share of tokens with g > 0."""
    terms = {key: None if each is None else each.share_open for key, each in measured.of_old().items()}
    none = NO_OLD if measured.generations else NO_GATE
    return mean_of("gate.false_open", terms, LOWER, none=none, missing=MISSING, unit="share of tokens")


def gate_false_close(measured: GateMeasurements) -> MetricValue:
    """Mean over generations and their own domains of the share of tokens with g < 1."""
    terms = {key: None if each is None else each.share_not_full for key, each in measured.of_own().items()}
    none = NO_OWN if measured.generations else NO_GATE
    return mean_of("gate.false_close", terms, LOWER, none=none, missing=MISSING, unit="share of tokens")


def gate_lag(measured: GateMeasurements) -> MetricValue:
    """Mean over generations and their old and own domains of the tokens until the gate settled, per document.

    Settled: on the side of 1/2 on which the document ends (GateUsage); 0 where it never changes side.
    """
    shares = {**measured.of_old(), **measured.of_own()}
    terms = {key: None if each is None else each.lag_tokens_mean for key, each in shares.items()}
    none = NO_OLD if measured.generations else NO_GATE
    return mean_of("gate.lag", terms, LOWER, none=none, missing=MISSING, unit="tokens")


def measure_gates(measured: GateMeasurements) -> dict[str, MetricValue]:
    """Every metric of this file by its name."""
    values = (gate_false_open(measured), gate_false_close(measured), gate_lag(measured))
    return {value.name: value for value in values}
