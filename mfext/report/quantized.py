"""What a quantization shows: how small the folder became, and what that cost on every domain measured."""

from __future__ import annotations

from collections.abc import Mapping

from mfext.report.quantities import (
    NONE,
    bits,
    change_percent,
    digits_for,
    interval,
    number,
    percent,
    plural,
    printable,
    signed,
    size,
)
from mfext.report.reading import Change, Json, change, flag, mapping, text
from mfext.report.reading import number as number_at
from mfext.report.report import KeyValues, Numbers, Report, Section, Table
from mfext.report.verdict import in_bits


def quantize_report(data: Json) -> Report:
    """The report of quantize; `data` as commands/quantize.py builds it (stable JSON, nats per byte)."""
    sections: list[Section] = [_sizes(data)]
    if mapping(data, "domains"):
        sections.append(_losses(data))
    places = (("from", text(data, "from")), ("model", text(data, "model")))
    hashes = (("SHA-256 before", text(data, "from_sha256")), ("SHA-256 after", text(data, "model_sha256")))
    sections.append(KeyValues("Where things are", pairs=(*places, *hashes)))
    title = f"mfext quantize · {printable(text(data, 'weights'))}"
    return Report("quantize", data, title, _verdict(data), tuple(sections))


def _verdict(data: Json) -> tuple[str, ...]:
    before, after = (number_at(data, which, "weights_bytes") for which in ("before", "after"))
    share = percent(after / before) if before and after else NONE
    would = "would be" if flag(data, "dry_run") else "became"
    lines = [f"{size(before)} of weights {would} {size(after)} as {text(data, 'weights')} ({share})"]
    mean, domains = in_bits(change(mapping(data, "mean"))), mapping(data, "domains")
    if domains and mean.difference is not None:
        shown = interval(mean.difference, mean.low, mean.high)
        lines.append(f"loss changed by {shown} bits per byte on average of {plural(len(domains), 'domain')}")
    elif not flag(data, "dry_run"):
        lines.append("loss not measured: name domains with --domain")
    return tuple(lines)


def _sizes(data: Json) -> Table:
    rows = []
    for label, key in (("weights", "weights_bytes"), ("folder on disk", "disk_bytes")):
        before, after = (number_at(data, which, key) for which in ("before", "after"))
        if before and after:
            rows.append((label, size(before), size(after), percent(after / before)))
    return Table(
        "Before and after",
        columns=("", "before", "after", "of before"),
        rows=tuple(rows),
        text_columns=("",),
        note="Storage only: opening it widens the weights to float32, so memory and speed stay as they were.",
    )


def _losses(data: Json) -> Table:
    entries = {name: entry for name, entry in mapping(data, "domains").items() if isinstance(entry, Mapping)}
    changed = {name: in_bits(change(entry)) for name, entry in entries.items()}
    changed |= {"mean": in_bits(change(mapping(data, "mean")))} if len(entries) > 1 else {}
    digits = min(5, digits_for(*(each.difference for each in changed.values())))
    rows, numbers = [], []
    for name, of in changed.items():
        before, after = (bits(number_at(entries.get(name, {}), key)) for key in ("before", "after"))
        relative = change_percent(before, after) if before is not None and after is not None else ""
        shown = ("", "") if name not in entries else (number(before, digits), number(after, digits))
        rows.append((name, *shown, signed(of.difference, digits), relative, _spread(of, digits)))
        numbers.append((name, before, after, of.difference, of.low, of.high))
    units = ("before", "after", "change", "low", "high")
    return Table(
        "Loss",
        columns=("domain", "before", "after", "change", "relative", "95 % interval"),
        rows=tuple(rows),
        text_columns=("domain", "95 % interval"),
        note=f"Bits per byte on the {text(data, 'split')} split, lower is better. Paired bootstrap over documents.",
        numbers=Numbers(("domain", *(f"{unit}_bits_per_byte" for unit in units)), tuple(numbers)),
    )


def _spread(of: Change, digits: int) -> str:
    return of.reason or (NONE if of.low is None else f"{signed(of.low, digits)} to {signed(of.high, digits)}")
