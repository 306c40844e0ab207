"""Tables of documents that change domain on the way, and of documents cut short."""

from __future__ import annotations

from collections.abc import Mapping

from mfext.report.quantities import number, plural, size, whole
from mfext.report.reading import Json, listed, mapping, objects, text
from mfext.report.reading import number as number_at
from mfext.report.report import Section, Table

REGIONS = ("before", "inside", "after")


def switch_sections(data: Json) -> tuple[Section, ...]:
    """What `eval --switch` measured: losses, gates where the model has some, short documents; none without --switch."""
    if "switch" not in data:
        return ()
    return tuple(each for each in (_losses(data), _gates(data), _short(data)) if each.rows)


def _losses(data: Json) -> Table:
    """One row a pair: each region's loss, beside that of the same bytes alone and uninterrupted."""
    rows = []
    for pair in objects(data, "switch", "pairs"):
        before, inside, after = objects(pair, "regions")
        cells = [(before, "bits_per_byte"), (inside, "bits_per_byte"), (inside, "alone_bits_per_byte")]
        cells += [(after, f"{each}bits_per_byte") for each in ("", "uninterrupted_", "alone_")]
        rows.append((text(pair, "outer"), text(pair, "inner"), *(number(number_at(*cell)) for cell in cells)))
    documents = plural(int(number_at(data, "switch", "documents") or 0), "document")
    sizes = f"{size(number_at(data, 'switch', 'bytes'))} a region, {documents} a pair"
    return Table(
        "Documents that switch domain and back",
        columns=("outer", "inner", "before", "inside", "inside alone", "after", "uninterrupted", "after alone"),
        rows=tuple(rows),
        text_columns=("outer", "inner"),
        note=f"Bits per byte; {sizes}. A document is outer text (before), inner text (inside), "
        "and the outer text going on (after). Alone: the same bytes as a document of their own. Uninterrupted: the "
        "outer text with nothing in between.",
    )


def _gates(data: Json) -> Table:
    """One row a pair and gate: mean openness per region, and how soon it settled after each switch."""
    owned = {text(each, "generation"): listed(each, "domains") for each in objects(data, "gates")}
    rows = []
    for pair in objects(data, "switch", "pairs"):
        regions = objects(pair, "regions")
        for index, first in enumerate(objects(regions[0], "gates")):
            name = text(first, "generation")
            gates = [objects(region, "gates")[index] for region in regions]
            opened = (number(number_at(gate, "mean_openness"), 2) for gate in gates)
            settled = (
                _settling(gate, text(region, "domain") in owned.get(name, (name,)))
                for gate, region in zip(gates[1:], regions[1:], strict=True)
            )
            rows.append((text(pair, "outer"), text(pair, "inner"), name, *opened, *settled))
    words = ("outer", "inner", "gate of", "then inside", "then after")
    return Table(
        "Gates where the domain switches",
        columns=("outer", "inner", "gate of", *REGIONS, "then inside", "then after"),
        rows=tuple(rows),
        text_columns=words,
        note="Before, inside, after: mean openness, from 0 (closed) to 1. Then: tokens into the region until the gate "
        "stays above one half where its generation learned that region's domain, else below it; the mean over the "
        "documents in which it does, and in how many it never does.",
    )


def _settling(gate: Json, own: bool) -> str:
    verb = "opens" if own else "closes"
    lag, never = number_at(gate, f"{verb}_after_tokens_mean"), number_at(gate, f"never_{verb}")
    if lag is None:
        return f"never {verb}"
    return f"{verb} after {number(lag, 0 if lag >= 10 else 1)}" + (f", {whole(never)} never" if never else "")


def _short(data: Json) -> Table:
    """Per domain the loss and every gate's openness by the length documents were cut to."""
    rows = []
    lengths = listed(data, "short", "bytes")
    for domain, entries in mapping(data, "short", "domains").items():
        cuts = [each for each in entries if isinstance(each, Mapping)] if isinstance(entries, list) else []
        rows.append((domain, "bits per byte", *(number(number_at(cut, "bits_per_byte")) for cut in cuts)))
        for index, first in enumerate(objects(cuts[0], "gates") if cuts else ()):
            opened = (number_at(objects(cut, "gates")[index], "mean_openness") for cut in cuts)
            rows.append((domain, f"gate of {text(first, 'generation')}", *(number(each, 2) for each in opened)))
    return Table(
        "Very short documents",
        columns=("domain", "what", *(f"{length} bytes" for length in lengths)),
        rows=tuple(rows),
        text_columns=("domain", "what"),
        note="Documents cut after so many bytes from their start: loss, and each gate's mean openness.",
    )
