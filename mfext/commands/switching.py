"""`mfext eval --switch`: documents that change domain and change back, and documents cut short.

Every ordered pair of the domains makes documents outer, inner, outer. Both outer regions are one passage of its domain,
interrupted, so what the interruption costs is seen beside the same passage without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

from mfext.commands.models import OpenedModel
from mfext.domains.domain import Domain, first_documents
from mfext.domains.passages import cut_passages
from mfext.domains.tokenizer import Tokenizer
from mfext.errors import InputError
from mfext.metrics.perplexity import Scoring
from mfext.metrics.switching import GateInRegion, Region, RegionText, measure_regions
from mfext.model.language_model import LanguageModel
from mfext.report.terminal import Console
from mfext.requests import EvalRequest

Document = tuple[RegionText, ...]


def measure_switching(
    opened: OpenedModel, domains: Sequence[Domain], tokenizer: Tokenizer, request: EvalRequest, console: Console
) -> dict[str, object]:
    """The keys `switch` and `short` of eval's JSON. Raises InputError where a domain has too little text for them."""
    size, config, settings = request.switch.bytes, opened.model.config, request.evaluation
    scoring = Scoring(settings.window, settings.batch_size, config.bos_id, config.pad_id, opened.model.device)
    passages = {each.name: _passages(each, tokenizer, request, (size, size)) for each in domains}
    some = min(map(len, passages.values()))
    console.say(f"documents that switch domain: {some} for each of {len(domains) * (len(domains) - 1)} ordered pairs")
    pairs = _pairs(opened.model, {name: each[:some] for name, each in passages.items()}, scoring)
    short: dict[str, object] = {}
    for domain in domains:
        cut = {length: _passages(domain, tokenizer, request, (length,)) for length in request.switch.short_bytes}
        short[domain.name] = [_short(opened.model, length, documents, scoring) for length, documents in cut.items()]
    return {
        "switch": {"bytes": size, "documents": some, "pairs": pairs},
        "short": {"bytes": list(request.switch.short_bytes), "domains": short},
    }


def _passages(domain: Domain, tokenizer: Tokenizer, request: EvalRequest, sizes: tuple[int, ...]) -> list[Document]:
    """The domain's passages of so many parts as token ids; one with a part of no tokens is left out."""
    texts = first_documents(domain.split(request.evaluation.split), request.evaluation.max_bytes)
    cut = cut_passages(texts, sizes, request.switch.documents)
    encoded = [tuple(RegionText(tokenizer.encode(part), len(part.encode())) for part in parts) for parts in cut]
    passages = [each for each in encoded if all(region.ids for region in each)]
    if not passages:
        raise InputError(
            f"domain '{domain.name}' has less than {sum(sizes)} bytes of {request.evaluation.split} text",
            domain.source,
            "add some, or lower switch.bytes and switch.short_bytes",
        )
    return passages


def _pairs(model: LanguageModel, passages: dict[str, list[Document]], scoring: Scoring) -> list[dict[str, object]]:
    """Every ordered pair's regions, each beside the same text in a document of its own."""
    whole = {name: measure_regions(model, each, scoring) for name, each in passages.items()}
    second = {name: measure_regions(model, [(b,) for _, b in each], scoring)[0] for name, each in passages.items()}
    pairs: list[dict[str, object]] = []
    for outer, inner in permutations(passages, 2):
        texts = [(a, between, b) for (a, b), (between, _) in zip(passages[outer], passages[inner], strict=True)]
        before, inside, after = measure_regions(model, texts, scoring)
        regions = (
            {"region": "before", "domain": outer, **_entry(model, before), **_alone(whole[outer][0])},
            {"region": "inside", "domain": inner, **_entry(model, inside), **_alone(whole[inner][0])},
            {"region": "after", "domain": outer, **_entry(model, after), **_alone(second[outer], whole[outer][1])},
        )
        pairs.append({"outer": outer, "inner": inner, "documents": len(texts), "regions": list(regions)})
    return pairs


def _alone(alone: Region, uninterrupted: Region | None = None) -> dict[str, object]:
    """The loss of the same bytes as documents of their own and, for the region after, without what came between."""
    return {
        "alone_bits_per_byte": alone.bits_per_byte,
        "uninterrupted_bits_per_byte": None if uninterrupted is None else uninterrupted.bits_per_byte,
    }


def _short(model: LanguageModel, length: int, documents: Sequence[Document], scoring: Scoring) -> dict[str, object]:
    (region,) = measure_regions(model, documents, scoring)
    return {"cut_bytes": length, "documents": len(documents), **_entry(model, region)}


def _entry(model: LanguageModel, region: Region) -> dict[str, object]:
    """A region's sums, and what every gated generation's gate did in it."""
    gated = [each.name for each in model.config.generations if each.mode == "gated"]
    return {
        "nll_nats": region.nats,
        "tokens": region.tokens,
        "bytes": region.bytes,
        "bits_per_byte": region.bits_per_byte,
        "gates": [_gate(name, gate) for name, gate in zip(gated, region.gates, strict=True)],
    }


def _gate(name: str, gate: GateInRegion) -> dict[str, object]:
    return {
        "generation": name,
        "mean_openness": gate.mean_openness,
        "opens_after_tokens_mean": gate.opening.mean,
        "never_opens": gate.opening.never,
        "closes_after_tokens_mean": gate.closing.mean,
        "never_closes": gate.closing.never,
    }
