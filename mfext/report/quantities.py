"""Numbers as people read them: bits per byte, intervals, counts, durations, sizes."""

from __future__ import annotations

import math
import unicodedata

MINUS = "\u2212"
NONE = "—"
THIN = "\u202f"


def bits(nats: float | None) -> float | None:
    """Nats to bits."""
    return None if nats is None else nats / math.log(2)


def number(value: float | None, digits: int = 3) -> str:
    """A plain number; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return NONE
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", MINUS)


def signed(value: float | None, digits: int = 3) -> str:
    """The same with its sign, also above zero."""
    text = number(value, digits)
    return f"+{text}" if value is not None and value > 0 and text != number(0.0, digits) else text


def digits_for(*sizes: float | None) -> int:
    """Decimal places, 3 to 5, that leave the smallest of `sizes` one significant digit."""
    known = [abs(size) for size in sizes if size is not None and size != 0 and math.isfinite(size)]
    return max(3, min(5, math.ceil(-math.log10(min(known))))) if known else 3


def interval(value: float | None, low: float | None, high: float | None, digits: int | None = None) -> str:
    """'a ± b' where the interval is as wide below as above, else 'a [low, high]'; 'a' where there is none."""
    if value is None:
        return NONE
    if low is None or high is None:
        return number(value, 3 if digits is None else digits)
    below, above = value - low, high - value
    digits = digits_for((high - low) / 2) if digits is None else digits
    half = (high - low) / 2
    if abs(above - below) <= max(0.2 * half, 10.0**-digits):
        return f"{number(value, digits)} ± {number(half, digits)}"
    return f"{number(value, digits)} [{number(low, digits)}, {number(high, digits)}]"


def percent(share: float | None, digits: int = 0) -> str:
    """A share as per cent; small ones keep a digit, so that 0 % means none."""
    if share is None:
        return NONE
    if 0 < share < 0.0005:
        return f"<0.1{THIN}%"
    fine = max(digits, 1) if 0 < abs(share) < 0.095 else digits
    return f"{number(100 * share, fine)}{THIN}%"


def change_percent(before: float, after: float) -> str:
    """The relative change, signed; empty where there is nothing to relate to."""
    if before <= 0:
        return ""
    change = 100 * (after / before - 1)
    return f"{signed(change, 0 if abs(change) >= 0.95 else 1)}{THIN}%"


def count(value: float | None) -> str:
    """3 significant digits with k, M, G; whole below 10 000."""
    if value is None:
        return NONE
    if abs(value) < 10_000:
        return whole(value)
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * factor:
            scaled = value / factor
            return f"{number(scaled, 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0)}{THIN}{unit}"
    return whole(value)


def brief(value: float) -> str:
    """A round count without the zeros that say nothing: 2 M, 1.5 k."""
    text, _, unit = count(value).partition(THIN)
    if not unit or not unit.isalpha():
        return count(value)
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text}{THIN}{unit}"


def whole(value: float | None) -> str:
    """All digits, in groups of three."""
    return NONE if value is None else f"{round(value):,}".replace(",", THIN).replace("-", MINUS)


def size(num_bytes: float | None) -> str:
    """Bytes as B, kB, MB, GB."""
    if num_bytes is None:
        return NONE
    return f"{count(num_bytes)}B" if num_bytes >= 10_000 else f"{whole(num_bytes)}{THIN}B"


def duration(seconds: float | None) -> str:
    """0.4 s, 12 s, 3 min 20 s, 2 h 05 min."""
    if seconds is None:
        return NONE
    if seconds < 10:
        return f"{number(seconds, 1)}{THIN}s"
    total = round(seconds)
    hours, minutes = total // 3600, total % 3600 // 60
    if hours:
        return f"{hours}{THIN}h {minutes:02d}{THIN}min"
    return f"{minutes}{THIN}min {total % 60:02d}{THIN}s" if minutes else f"{total}{THIN}s"


def clock(seconds: float) -> str:
    """0:12, 3:20, 1:02:05."""
    total = max(0, round(seconds))
    hours, minutes = total // 3600, total % 3600 // 60
    return f"{hours}:{minutes:02d}:{total % 60:02d}" if hours else f"{minutes}:{total % 60:02d}"


def plural(number_of: int, noun: str) -> str:
    """1 old domain, 3 old domains."""
    return f"{number_of} {noun}{'' if number_of == 1 else 's'}"


def printable(text: str) -> str:
    """`text` without characters that steer a terminal or turn the direction of writing; white space becomes blanks."""
    return "".join(" " if sign in "\t\n\r" else "\ufffd" if _steers(sign) else sign for sign in text)


def _steers(sign: str) -> bool:
    return unicodedata.category(sign) in ("Cc", "Cs") or "\u202a" <= sign <= "\u202e" or "\u2066" <= sign <= "\u2069"
