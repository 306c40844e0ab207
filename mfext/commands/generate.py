"""`mfext generate`: text from a model, with cached decoding.

prompts -> tokenizer -> ModuleFormer.generate -> report
"""

from __future__ import annotations

import time

from mfext.commands.models import open_model
from mfext.commands.setting import prepare_machine, tokenizer_of
from mfext.errors import InputError
from mfext.model.generate import Sampling, pad_left
from mfext.report.report import Report, Section, Text
from mfext.report.terminal import Console
from mfext.requests import DEFAULT_INVOCATION, GenerateRequest, Invocation


def run(request: GenerateRequest, invocation: Invocation = DEFAULT_INVOCATION) -> Report:
    """Continue every prompt of the request; an empty prompt begins a document. Writes nothing."""
    console = Console.of(invocation)
    sampling = _sampling(request)
    device = prepare_machine(invocation)
    opened = open_model(request.model)
    model, tokenizer = opened.model.to(device), tokenizer_of(opened, request.tokenizer)
    prompts = [[model.config.bos_id, *tokenizer.encode(prompt)] for prompt in request.prompts]
    input_ids, attention_mask = pad_left(prompts, model.config.pad_id)
    begun = time.monotonic()
    rows = model.generate(input_ids, attention_mask, sampling, tokenizer.decode).rows
    wall_s = time.monotonic() - begun
    num_tokens = sum(len(row.tokens) for row in rows)
    console.say(f"{num_tokens} tokens in {wall_s:.1f} s ({num_tokens / wall_s:.0f} per second)")
    texts = [row.text or "" for row in rows]
    data: dict[str, object] = {
        "model": str(opened.folder),
        "model_sha256": opened.sha256,
        "tokenizer": tokenizer.name,
        "continuations": [
            {"prompt": prompt, "text": text, "finish": row.finish, "tokens": list(row.tokens)}
            for prompt, text, row in zip(request.prompts, texts, rows, strict=True)
        ],
        "tokens": num_tokens,
        "wall_s": wall_s,
        "tokens_per_s": num_tokens / wall_s,
    }
    return Report("generate", data, "generate", sections=_sections(request.prompts, texts))


def _sampling(request: GenerateRequest) -> Sampling:
    try:
        return Sampling(
            max_new_tokens=request.max_new_tokens,
            temperature=request.temperature,
            top_k=request.top_k or 0,
            top_p=request.top_p or 1.0,
            stop_strings=request.stop,
            seed=request.seed,
        )
    except ValueError as error:
        raise InputError("cannot sample like this", "mfext generate", str(error)) from error


def _sections(prompts: tuple[str, ...], texts: list[str]) -> tuple[Section, ...]:
    """Prompt and continuation as one text each; numbered where there are several."""
    numbered = len(prompts) > 1
    return tuple(
        Text(f"prompt {number}" if numbered else "", ((prompt + text).expandtabs(4),))
        for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True), 1)
    )
