"""How far two texts use the same experts: 1 and 0 where they use them alike, 0 and log 2 where they share none.

Compared bank by bank: at each site the text's distribution over (generation, expert), as drift.py defines it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mfext.metrics.details import BankShares, DomainDetails
from mfext.metrics.drift import jensen_shannon, site_distributions
from mfext.metrics.usage import Usage


@dataclass(frozen=True)
class Overlap:
    """Means over the sites that route tokens of both texts; both None where there is no such site.

    `cosine` of the two distributions, 0 to 1; `divergence_nats`, their Jensen-Shannon divergence, 0 to log 2.
    """

    cosine: float | None
    divergence_nats: float | None


def overlap(a: Usage, b: Usage) -> Overlap:
    """The overlap of two texts' usage of one model."""
    there, here = site_distributions(_details(a)), site_distributions(_details(b))
    pairs = []
    for site in (site for site in there if site in here):
        experts = sorted({*there[site], *here[site]})
        p_E, q_E = ([of.get(expert, 0.0) for expert in experts] for of in (there[site], here[site]))
        if any(p_E) and any(q_E):
            pairs.append((_cosine(p_E, q_E), jensen_shannon(p_E, q_E)))
    if not pairs:
        return Overlap(None, None)
    cosines, divergences = zip(*pairs, strict=True)
    return Overlap(math.fsum(cosines) / len(pairs), math.fsum(divergences) / len(pairs))


def _details(usage: Usage) -> DomainDetails:
    return DomainDetails(tuple(BankShares(*bank.key, bank.tokens, bank.share) for bank in usage.banks))


def _cosine(p_E: Sequence[float], q_E: Sequence[float]) -> float:
    product = math.fsum(p * q for p, q in zip(p_E, q_E, strict=True))
    return min(1.0, product / math.hypot(*p_E) / math.hypot(*q_E))
