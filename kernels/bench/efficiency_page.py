"""The page and the picture of what a loss costs, from the JSON of efficiency.py."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

COLOURS = ("#2f6fb0", "#c8553d", "#6a994e", "#8d5fa8")
WIDTH, HEIGHT, LEFT, TOP, GAP = 420, 260, 52, 34, 70
KINDS = {
    "train": "training step",
    "evaluate": "evaluation forward",
    "decode": "cached decoding, one sequence",
    "decode_torch": "the same, ModuleFormer's step through torch too",
}
LIMITS = (
    "One seed: small differences between models are not testable from this page. The models are small, the text is one "
    "domain, and training stops long before any of them has learned what it could. Learning rates were chosen at half "
    "the tokens. Every run has one schedule over all its tokens: a level that one model reaches at its end and another "
    "half-way is dearer for the second than in a run planned to stop there. "
    "Cached decoding compares what is built: ModuleFormer has a compiled step, the dense models have none; "
    "the line through torch compares the architectures."
)
Json = Mapping[str, Any]


def to_markdown(data: Json) -> str:
    """The whole page."""
    at = data["surroundings"]
    head = (
        f"{at['date'][:10]}, commit {at['commit']}, {at['processor']}, {at['cpu_capability']}, torch {at['torch']}, "
        f"one thread; seed {data['seed']}. Domain {data['domain']}, {data['tokens']:_} tokens each, losses in bits per "
        "byte on validation text. Seconds are CPU seconds, medians of runs taken in turns in one process; time to a "
        "loss is tokens to it times a training step's time a token, without evaluation. Raw: efficiency.json."
    )
    parts = [
        "# ModuleFormer against dense transformers: what a loss costs",
        "    make efficiency",
        head,
        *verdict(data),
        "![Validation loss over tokens and over CPU seconds](efficiency.svg)",
        "## Models",
        table(*_models(data)),
        "## Tokens per CPU second",
        table(*_speeds(data)),
        "## Cost of reaching a loss",
        f"In brackets: the model's cost over that of `{data['reference']}`; above 1 `{data['reference']}` needs less. "
        "Between two measurements the loss is taken as linear in tokens; a level counts from its first crossing.",
        table(*_levels(data)),
        "## Loss curves",
        table(*_curves(data)),
        "## What this does not say",
        LIMITS,
    ]
    return "\n\n".join(parts) + "\n"


def verdict(data: Json) -> list[str]:
    """Plain sentences: who needs less, at the lowest loss that both reached, in training and in inference.

    A model's speed of inference does not depend on how long it was trained: at a loss both reach it is the same ratio.
    """
    name, lines = data["reference"], []
    for other in data["models"]:
        if other == name:
            continue
        both = [level for level in data["levels"] if level["time_ratio"][other] is not None]
        if both:
            level = both[-1]
            tokens, seconds = level["token_ratio"][other], level["time_ratio"][other]
            lines.append(
                f"- Training: to {bits(level['loss'])} bits per byte, the lowest level both reached, `{other}` needs "
                f"{tokens:.2f} times the tokens and {seconds:.2f} times the CPU time of `{name}`: `{name}` "
                f"{'wins' if seconds > 1 else 'loses'} in time. Inference at that loss, tokens a second of `{name}` "
                f"over `{other}`'s: {_inference(data, other)}."
            )
        for level in data["levels"]:
            if level["time_ratio"][other] is None:
                who = other if level["reached"][other]["tokens"] is None else name
                lines.append(f"- `{who}` never reached {bits(level['loss'])} bits per byte: {_lowest(data, who)}.")
                break
    return ["\n".join([*lines, *_at_equal_tokens(data)])]


def _at_equal_tokens(data: Json) -> list[str]:
    """What a dense model that is as good after the same tokens would cost a token of inference."""
    name, told, untold = data["reference"], [], []
    for kind, entry in data["inference_at_equal_loss"].items():
        if entry["dense_over_reference"] is None:
            untold.append(entry["reason"])
        else:
            told.append(f"{entry['dense_over_reference']:.2f} ({KINDS[kind]})")
    start = "- Inference at equal loss after equal tokens of training, by a dense model read between those measured"
    lines = [f"{start}: its time a token over that of `{name}`: {', '.join(told)}."] if told else []
    return lines + [f"{start}: not to be told, {reason}." for reason in dict.fromkeys(untold)]


def _lowest(data: Json, name: str) -> str:
    (curve,) = (curve for curve in data["curves"] if curve["name"] == name)
    return f"its lowest is {bits(min(curve['loss']))}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def bits(nats: float) -> str:
    """Nats per byte as bits per byte."""
    return f"{nats / math.log(2):.3f}"


def to_svg(data: Json) -> str:
    """Loss over tokens and over CPU seconds, side by side; readable on light and on dark pages."""
    total = LEFT + 2 * WIDTH + GAP + 20
    body = [
        _panel(data, "tokens", "tokens (thousands)", 1e-3, LEFT),
        _panel(data, "cpu_s", "CPU seconds of training", 1.0, LEFT + WIDTH + GAP),
    ]
    for number, curve in enumerate(data["curves"]):
        x = LEFT + number * 200
        body.append(f'<rect x="{x}" y="6" width="14" height="4" fill="{COLOURS[number % len(COLOURS)]}"/>')
        body.append(f'<text x="{x + 20}" y="13">{curve["name"]}</text>')
    style = "<style>text{font:12px sans-serif;fill:#808080}.axis{stroke:#808080;stroke-width:.5;fill:none}</style>"
    view = f'viewBox="0 0 {total} {TOP + HEIGHT + 44}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {view}>\n{style}\n' + "\n".join(body) + "\n</svg>\n"


def _panel(data: Json, key: str, label: str, unit: float, left: int) -> str:
    curves = [
        (curve["name"], [x * unit for x in curve[key]], [loss / math.log(2) for loss in curve["loss"]])
        for curve in data["curves"]
    ]
    right = max(max(xs) for _, xs, _ in curves)
    high, low = max(max(ys) for *_, ys in curves), min(min(ys) for *_, ys in curves)

    def place(x: float, y: float) -> tuple[float, float]:
        return left + WIDTH * x / right, TOP + HEIGHT * (high - y) / (high - low)

    drawn = [f'<path class="axis" d="M{left} {TOP}V{TOP + HEIGHT}H{left + WIDTH}"/>']
    for number in range(5):
        y, x = low + (high - low) * number / 4, right * number / 4
        drawn.append(f'<text x="{left - 6}" y="{place(0, y)[1] + 4:.1f}" text-anchor="end">{y:.2f}</text>')
        drawn.append(f'<text x="{place(x, low)[0]:.1f}" y="{TOP + HEIGHT + 16}" text-anchor="middle">{x:.0f}</text>')
    drawn.append(f'<text x="{left + WIDTH / 2}" y="{TOP + HEIGHT + 36}" text-anchor="middle">{label}</text>')
    for number, (_, xs, ys) in enumerate(curves):
        points = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in zip(xs, ys, strict=True))
        drawn.append(
            f'<polyline points="{points}" fill="none" stroke="{COLOURS[number % len(COLOURS)]}" stroke-width="2"/>'
        )
    return "\n".join(drawn)


def _models(data: Json) -> tuple[list[str], list[list[str]]]:
    head = ["model", "parameters", "active a token", "learning rate", "bits per byte at the end", "wall s"]
    rows = [
        [
            f"`{name}`",
            f"{each['parameters']:_}",
            f"{each['active_per_token']:_}",
            f"{each['learning_rate']:g}",
            bits(each["final_loss"]),
            f"{each['trained_wall_s']:.0f}",
        ]
        for name, each in data["models"].items()
    ]
    return head, rows


def _speeds(data: Json) -> tuple[list[str], list[list[str]]]:
    names = list(data["models"])
    rows = []
    for kind, what in KINDS.items():
        speeds = [data["models"][name]["tokens_per_cpu_s"][kind] for name in names]
        own = data["models"][data["reference"]]["tokens_per_cpu_s"][kind]
        rows.append([what, *(f"{speed:.0f} ({own / speed:.2f})" for speed in speeds)])
    return [f"(in brackets: speed of `{data['reference']}` over the model's)", *(f"`{name}`" for name in names)], rows


def _levels(data: Json) -> tuple[list[str], list[list[str]]]:
    names = list(data["models"])
    rows = []
    for level in data["levels"]:
        row = [bits(level["loss"])]
        for name in names:
            reached = level["reached"][name]
            if reached["tokens"] is None:
                row.append("never")
                continue
            row.append(
                f"{reached['tokens'] / 1e3:.0f} k tokens{_ratio(level['token_ratio'][name])}, "
                f"{reached['cpu_s']:.1f} s{_ratio(level['time_ratio'][name])}"
            )
        rows.append(row)
    return ["bits per byte", *(f"`{name}`" for name in names)], rows


def _curves(data: Json) -> tuple[list[str], list[list[str]]]:
    curves = data["curves"]
    every = max(1, len(curves[0]["tokens"]) // 12)
    points = range(every - 1, len(curves[0]["tokens"]), every)
    rows = [[f"{curves[0]['tokens'][point]:_}", *(bits(curve["loss"][point]) for curve in curves)] for point in points]
    return ["tokens", *(f"`{curve['name']}`" for curve in curves)], rows


def _inference(data: Json, other: str) -> str:
    own, theirs = (data["models"][name]["tokens_per_cpu_s"] for name in (data["reference"], other))
    return ", ".join(f"{own[kind] / theirs[kind]:.2f} ({what})" for kind, what in KINDS.items() if kind != "train")


def _ratio(value: float | None) -> str:
    return "" if value is None else f" ({value:.2f})"
