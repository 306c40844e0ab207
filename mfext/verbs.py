"""The verbs and flags, as data: parsing, help and shell completion all read this table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["text", "list", "many", "whole", "number", "switch", "count", "group"]


@dataclass(frozen=True)
class Flag:
    """`--name VALUE`, a friendlier spelling of `key=VALUE`.

    Kinds: `list` splits at commas, `many` may be given several times, `group` chooses an option of conf/, `switch` and
    `count` take no value. `key` starts with "invocation." where the flag says how to run and not what to compute.
    """

    name: str
    key: str
    kind: Kind
    help: str
    metavar: str = ""
    short: str = ""

    @property
    def takes_value(self) -> bool:
        """True where a value must follow."""
        return self.kind not in ("switch", "count")


@dataclass(frozen=True)
class Verb:
    """One verb. `takes` is "recipe", or the name of a class in requests.py.

    `positional` holds the keys of the bare arguments in order, with blanks between them.
    """

    name: str
    module: str
    takes: str
    summary: str
    example: str
    flags: tuple[Flag, ...]
    positional: str = ""

    def flag(self, name: str) -> Flag | None:
        """The flag spelled `name`, long or short."""
        return next((flag for flag in self.flags if name in (flag.name, flag.short)), None)


_COMMON = (
    Flag("--json", "invocation.json", "switch", "print one JSON object on stdout and nothing else there"),
    Flag("--seed", "seed", "whole", "seed of everything random", "N"),
    Flag("--device", "invocation.device", "text", "cpu, gpu or auto", "NAME"),
    Flag("--threads", "invocation.threads", "whole", "CPU threads; results repeat bit for bit on the same number", "N"),
    Flag("--quiet", "invocation.quiet", "switch", "no progress, only results and errors", short="-q"),
    Flag("--verbose", "invocation.verbosity", "count", "say more; twice for still more", short="-v"),
    Flag("--debug", "invocation.debug", "switch", "show tracebacks"),
    Flag("--help", "help", "switch", "this text", short="-h"),
)
_RECIPE = (
    Flag("--out", "out", "text", "folder to write the run to", "DIR"),
    Flag("--recipe", "recipe", "text", "a name in recipes/ or a YAML file", "NAME"),
    Flag("--resume", "invocation.resume", "text", "continue an interrupted run exactly", "RUN"),
    Flag("--dry-run", "invocation.dry_run", "switch", "say what would be built and what it costs; write nothing"),
    Flag("--multirun", "multirun", "switch", "run every combination of key=a,b; again goes on", short="-m"),
    Flag("--jobs", "invocation.jobs", "whole", "with -m: trials to run at a time", "N"),
    Flag("--array-job", "invocation.array_job", "text", "with -m: write a job script (slurm) and run nothing", "NAME"),
    *_COMMON,
)
_MODEL = Flag("--model", "model", "text", "model or run folder", "DIR")
_METHODS = "grow, full, replay, ewc, lwf, lora, expand, concentrate, frozen, joint or independent"
_TOKENIZER = Flag("--tokenizer", "tokenizer", "text", "bytes, a tokenizer.json or its folder", "PATH")

VERBS = (
    Verb(
        "pretrain",
        "mfext.commands.pretrain",
        "recipe",
        "a base model from random weights, on one domain or a mix",
        "mfext pretrain --domain prose,code --out my_base",
        (Flag("--domain", "domain", "text", "a domain, or several joined by commas", "A,B"), _TOKENIZER, *_RECIPE),
    ),
    Verb(
        "grow",
        "mfext.commands.grow",
        "recipe",
        "add experts for a new domain, train only those, measure what was forgotten",
        "mfext grow --domain code",
        (
            Flag("--domain", "domain", "text", "what to learn: a name, a folder, or hf:owner/name", "D"),
            Flag("--base", "base", "text", "model or run folder to grow; built and kept when absent", "DIR"),
            Flag("--method", "method", "group", _METHODS, "NAME"),
            _TOKENIZER,
            *_RECIPE,
        ),
    ),
    Verb(
        "continual",
        "mfext.commands.continual",
        "recipe",
        "learn a stream of domains, one stage after another, by any method",
        "mfext continual --domains prose,code,unicode_names --method grow",
        (
            Flag("--domains", "domains", "list", "the stream, joined by commas; a domain may come again", "A,B,C"),
            Flag("--base", "base", "text", "model or run folder; without one the first domain pretrains it", "DIR"),
            Flag("--method", "method", "group", _METHODS, "NAME"),
            _TOKENIZER,
            *_RECIPE,
        ),
    ),
    Verb(
        "eval",
        "mfext.commands.evaluate",
        "EvalRequest",
        "losses and expert usage of a model on domains",
        "mfext eval --model my_run --domain prose,code",
        (
            _MODEL,
            Flag("--domain", "domains", "list", "domains joined by commas", "A,B"),
            Flag("--split", "evaluation.split", "text", "validation, or test for final numbers", "NAME"),
            Flag("--max-bytes", "evaluation.max_bytes", "whole", "cap of each domain", "N"),
            Flag("--switch", "switch.on", "switch", "also documents that change domain and back, and short ones"),
            _TOKENIZER,
            *_COMMON,
        ),
    ),
    Verb(
        "prune",
        "mfext.commands.prune",
        "recipe",
        "keep only the experts a domain needs: the curve of what that costs, and the smaller model",
        "mfext prune --model my_run --domain code --keep 0.5",
        (
            Flag("--model", "base", "text", "model or run folder to prune", "DIR"),
            Flag("--domain", "domain", "text", "the domain to keep experts for", "D"),
            Flag("--keep", "pruning.keep", "number", "share of the experts to keep", "X"),
            Flag("--criterion", "pruning", "group", "contribution, gate_mass, usage, ablation or random", "NAME"),
            Flag(
                "--max-loss-increase", "pruning.max_loss_increase", "number", "the fewest within it; 0.01 is 1 %", "X"
            ),
            Flag("--drop-generation", "pruning.drop_generations", "list", "remove these whole, nothing else", "A,B"),
            Flag("--method", "method", "group", "fine-tune first: full, concentrate, ...; frozen does not", "NAME"),
            _TOKENIZER,
            *_RECIPE,
        ),
    ),
    Verb(
        "restore",
        "mfext.commands.restore",
        "RestoreRequest",
        "put the experts or generations a pruning removed back in their places, bit for bit",
        "mfext restore runs/prune-code --out whole",
        (
            Flag("--model", "model", "text", "the pruned model, grown since or not; else the run's own", "DIR"),
            Flag("--out", "out", "text", "folder for the whole model", "DIR"),
            *_COMMON,
        ),
        positional="run",
    ),
    Verb(
        "quantize",
        "mfext.commands.quantize",
        "QuantizeRequest",
        "the same model in a smaller folder, as int8 or bf16, and what that costs",
        "mfext quantize --model my_run --to int8 --domain prose,code",
        (
            _MODEL,
            Flag("--to", "to", "text", "int8 (a quarter of the bytes; needs torchao) or bf16 (half)", "FORMAT"),
            Flag("--domain", "domains", "list", "measure the loss before and after on these, joined by commas", "A,B"),
            Flag("--split", "evaluation.split", "text", "validation, or test for final numbers", "NAME"),
            Flag("--max-bytes", "evaluation.max_bytes", "whole", "cap of each domain", "N"),
            Flag("--out", "out", "text", "folder for the smaller model", "DIR"),
            Flag("--dry-run", "invocation.dry_run", "switch", "only say how small it would be"),
            _TOKENIZER,
            *_COMMON,
        ),
    ),
    Verb(
        "inspect",
        "mfext.commands.inspect",
        "InspectRequest",
        "layers, generations, lineage and sizes of a model; what its experts do on domains",
        "mfext inspect --model my_run --domain prose,code --out experts.html",
        (
            _MODEL,
            Flag("--domain", "domains", "list", "show which experts these domains use, joined by commas", "A,B"),
            Flag("--split", "evaluation.split", "text", "validation, or test for final numbers", "NAME"),
            Flag("--max-bytes", "evaluation.max_bytes", "whole", "cap of each domain", "N"),
            Flag("--out", "out", "text", "write it all as one HTML page too", "FILE"),
            _TOKENIZER,
            *_COMMON,
        ),
    ),
    Verb(
        "generate",
        "mfext.commands.generate",
        "GenerateRequest",
        "text from a model, with cached decoding",
        "mfext generate --model my_run --prompt 'def main(' --temperature 0",
        (
            _MODEL,
            Flag("--prompt", "prompts", "many", "text to continue; give it again for a batch", "TEXT"),
            Flag("--max-new-tokens", "max_new_tokens", "whole", "how far to write", "N"),
            Flag("--temperature", "temperature", "number", "0 is greedy", "X"),
            Flag("--top-k", "top_k", "whole", "only the K likeliest tokens", "K"),
            Flag("--top-p", "top_p", "number", "only the likeliest tokens that make up P", "P"),
            Flag("--stop", "stop", "many", "stop after this text; give it again for several", "TEXT"),
            _TOKENIZER,
            *_COMMON,
        ),
    ),
    Verb(
        "report",
        "mfext.commands.report",
        "ReportRequest",
        "rebuild the reports of a run or a sweep from its raw ledger",
        "mfext report my_run",
        (Flag("--format", "format", "text", "write every table too: csv or latex, to tables/", "NAME"), *_COMMON),
        positional="run",
    ),
    Verb(
        "compare",
        "mfext.commands.compare",
        "CompareRequest",
        "two runs on the same documents, paired: which last stage is better, and by how much",
        "mfext compare runs/grow runs/full",
        (Flag("--out", "out", "text", "write the comparison as one HTML page too", "FILE"), *_COMMON),
        positional="run_a run_b",
    ),
    Verb(
        "check",
        "mfext.commands.check",
        "CheckRequest",
        "hold a run to budgets in bits per byte; exit code 5 where one is broken",
        "mfext check my_run --max-forgetting 0.02 --min-learned 0.5",
        (
            Flag("--max-forgetting", "max_forgetting", "number", "mean rise on old domains, bits per byte", "X"),
            Flag("--min-learned", "min_learned", "number", "fall on every domain learned, bits per byte", "Y"),
            Flag("--max-bystander", "max_bystander", "number", "rise on any domain never trained, bits per byte", "Z"),
            Flag("--strict", "strict", "switch", "hold the bad end of each 95 % interval to it, not the estimate"),
            *_COMMON,
        ),
        positional="run",
    ),
    Verb(
        "trial",
        "mfext.commands.trial",
        "TrialRequest",
        "one trial of a planned sweep, for job scripts",
        "mfext trial runs/sweep-grow --number 0",
        (
            Flag("--number", "number", "whole", "which trial, from 0", "N"),
            Flag("--follow", "follow", "whole", "stop when this process, which started it, is gone", "PID"),
            *_COMMON,
        ),
        positional="run",
    ),
    Verb(
        "bench",
        "mfext.commands.bench",
        "BenchRequest",
        "speed and memory of this machine, against dense models and the plain formulation",
        "mfext bench",
        (Flag("--size", "size", "text", "small takes a minute; tiny only shows that it works", "NAME"), *_COMMON),
    ),
    Verb(
        "doctor",
        "mfext.commands.doctor",
        "DoctorRequest",
        "versions, devices, kernel self-check, what is missing: for a bug report",
        "mfext doctor",
        _COMMON,
    ),
    Verb(
        "completion",
        "",
        "",
        "shell completion for bash, zsh or fish",
        'eval "$(mfext completion bash)"',
        (Flag("--help", "help", "switch", "this text", short="-h"),),
        positional="shell",
    ),
)


def find_verb(name: str) -> Verb | None:
    """The verb called `name`."""
    return next((verb for verb in VERBS if verb.name == name), None)


def help_text() -> str:
    """What `mfext --help` prints."""
    width = max(len(verb.name) for verb in VERBS)
    lines = [
        "usage: mfext VERB [--flag value ...] [key=value ...] [-m]",
        "",
        "Grow a ModuleFormer with new experts so that it learns a new domain without forgetting the old ones.",
        "",
        *(f"  {verb.name:<{width}}  {verb.summary}" for verb in VERBS),
        "",
        "Start with:  mfext grow --domain code",
        "More:        mfext VERB --help, mfext --version",
    ]
    return "\n".join(lines)


def verb_help(verb: Verb) -> str:
    """What `mfext VERB --help` prints."""
    spelled = [
        (", ".join(filter(None, (flag.short, flag.name))) + (f" {flag.metavar}" if flag.metavar else ""), flag.help)
        for flag in verb.flags
    ]
    width = max(len(left) for left, _ in spelled)
    argument = f" {verb.positional.upper()}" if verb.positional else ""
    keys = " [key=value ...]" if verb.takes else ""
    lines = [
        f"usage: mfext {verb.name}{argument} [--flag value ...]{keys}",
        "",
        f"  {verb.summary}",
        "",
        f"example: {verb.example}",
        "",
        *(f"  {left:<{width}}  {right}" for left, right in spelled),
    ]
    if verb.takes == "recipe":
        lines += ["", "Every key of the recipe can be set, such as training.tokens=2_000_000 or growth=compete."]
    return "\n".join(lines)
