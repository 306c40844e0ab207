"""The matrix L[i, j]: nats per byte on domain j after stage i, with the stages in which each domain was trained.

L is a loss (lower is better), S is the last stage, stage 0 is the untouched base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mfext.errors import InputError
from mfext.metrics.ledger import Ledger


@dataclass(frozen=True)
class TransferMatrix:
    """L[i, j] as rows of stages and columns of domains; None where it was not measured.

    `learned_stage[domain]`: 0 for a domain of the base, i for one learned in stage i (the latest, where it was trained
    in several), None for a bystander. `first_trained[domain]`: the first of several stages, for those domains only.
    """

    stage_names: tuple[str, ...]
    domains: tuple[str, ...]
    nll_per_byte: tuple[tuple[float | None, ...], ...]
    learned_stage: Mapping[str, int | None]
    first_trained: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert len(self.nll_per_byte) == len(self.stage_names) >= 1, "one row per stage, the base's at least"
        assert all(len(row) == len(self.domains) for row in self.nll_per_byte), "one column per domain"
        assert len(set(self.domains)) == len(self.domains), "a domain is one column"
        assert set(self.learned_stage) == set(self.domains), "learned_stage names every domain"
        stages = [stage for stage in self.learned_stage.values() if stage is not None]
        assert all(0 <= stage < len(self.stage_names) for stage in stages), "domains are learned in existing stages"
        for domain, first in self.first_trained.items():
            assert 0 <= first <= self.stage_of(domain), "a domain is first trained no later than it was learned"

    @classmethod
    def from_ledger(
        cls,
        ledger: Ledger,
        base_domains: Sequence[str],
        learned: Mapping[str, int | Sequence[int]],
        bystanders: Sequence[str] = (),
        split: str = "validation",
    ) -> TransferMatrix:
        """The matrix of a run's `split`, from byte-weighted sums, each stage's highest step.

        `learned` gives the stage, or all stages, a domain was trained in. Columns: the base's domains, then the learned
        ones by stage, then bystanders. A domain in several lists counts as learned first, then as the base's: what was
        trained on is no bystander. Rows: up to the last stage that was measured on `split` or learned a domain, so a
        stage still in training has none. InputError where `learned` names a stage the ledger does not have.
        """
        known = max(ledger.num_stages - 1, 0)
        trained = {domain: (each,) if isinstance(each, int) else tuple(each) for domain, each in learned.items()}
        late = {name: stages for name, stages in trained.items() if not all(0 <= stage <= known for stage in stages)}
        if late:
            raise InputError("the ledger lacks the stage a domain was learned in", late, f"its last stage is {known}")
        latest = {domain: max(stages) for domain, stages in trained.items() if stages}
        firsts = {domain: 0 if domain in base_domains else min(trained[domain]) for domain in latest}
        by_stage = sorted((domain for domain in latest if domain not in base_domains), key=lambda name: latest[name])
        stages: dict[str, int | None] = {domain: latest.get(domain, 0) for domain in (*base_domains, *by_stage)}
        stages = {**stages, **{domain: None for domain in bystanders if domain not in stages}}
        domains = tuple(stages)
        names, matrix = [], []
        last = max([row.stage for row in ledger if row.split == split] + list(latest.values()), default=0)
        for stage in range(last + 1):
            rows = [ledger.at(stage, domain, split) for domain in domains]
            names.append(next((row.stage_name for row in rows if row is not None), f"stage {stage}"))
            matrix.append(tuple(None if row is None else row.nats_per_byte for row in rows))
        repeated = {domain: first for domain, first in firsts.items() if first < latest[domain]}
        return cls(tuple(names), domains, tuple(matrix), stages, repeated)

    @property
    def last(self) -> int:
        """S, the number of the last stage."""
        return len(self.stage_names) - 1

    def at(self, stage: int, domain: str) -> float | None:
        """L[stage, domain]."""
        return self.nll_per_byte[stage][self.domains.index(domain)]

    def trained_domains(self) -> tuple[str, ...]:
        """Domains the base knew or a stage learned: all but the bystanders."""
        return tuple(name for name in self.domains if self.learned_stage[name] is not None)

    def old_domains(self) -> tuple[str, ...]:
        """Domains learned before the last stage, the base's included."""
        return tuple(name for name in self.trained_domains() if self.stage_of(name) < self.last)

    def base_domains(self) -> tuple[str, ...]:
        """Domains the untouched base knew and no stage trained again."""
        return tuple(name for name in self.domains if self.learned_stage[name] == 0)

    def new_domains(self) -> tuple[str, ...]:
        """Domains learned in a stage after the base."""
        return tuple(name for name in self.trained_domains() if self.stage_of(name) > 0)

    def stage_of(self, domain: str) -> int:
        """The stage a trained domain was learned in, the latest of several."""
        stage = self.learned_stage[domain]
        assert stage is not None, f"{domain} is a bystander"
        return stage

    def first_stage_of(self, domain: str) -> int:
        """The first stage a trained domain was trained in; 0 for one the base knew."""
        return self.first_trained.get(domain, self.stage_of(domain))
