"""argv -> verb, flags, overrides -> a command's Report -> terminal or JSON, and the exit code.

Imports no torch, lightning, datasets, triton or hydra: help and most errors answer in a fraction of a second. What a
recipe or request names is checked before the command's heavy modules load.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import importlib
import json
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from mfext import __version__, requests
from mfext.completion import completion_script
from mfext.config import Recipe
from mfext.conversion import did_you_mean, from_mapping, to_mapping
from mfext.errors import InputError, MfextError
from mfext.process import keep_freed_memory, wait_without_spinning
from mfext.verbs import VERBS, Flag, Verb, find_verb, help_text, verb_help

if TYPE_CHECKING:
    from mfext.report.report import Report

_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENOMEM)


@dataclass
class Arguments:
    """What was typed after the verb, sorted by purpose."""

    values: dict[str, Any] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)

    def take(self, prefix: str) -> dict[str, Any]:
        """Remove and return the values whose key starts with `prefix`, without it."""
        keys = [key for key in self.values if key.startswith(prefix)]
        return {key.removeprefix(prefix): self.values.pop(key) for key in keys}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; the exit code is that of cli.md's table. Never raises for a user's mistake."""
    words = list(sys.argv[1:] if argv is None else argv)
    boundary = _Boundary(debug="--debug" in words)
    with boundary, _terminable():
        keep_freed_memory()
        wait_without_spinning()
        _dispatch(words)
    return boundary.code


class _Terminated(KeyboardInterrupt):
    """By SIGTERM, at any line: not an Exception, which the library at work may catch and tell as its own failure."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends a verb as Ctrl-C does: one line, an exit code, nothing half-written left. Training has its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if former is None else former)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _Terminated


class _Boundary:
    """Where every failure becomes one line on stderr and an exit code."""

    def __init__(self, debug: bool) -> None:
        self.debug = debug
        self.code = 0

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is None:
            return True
        if isinstance(error, (SystemExit, GeneratorExit)):
            return False
        if self.debug:
            traceback.print_exception(kind, error, trace, file=sys.stderr)
        self.code, line = _explain(error)
        if line:
            print(f"mfext: error: {' '.join(line.split())}", file=sys.stderr)
        return True


def _explain(error: BaseException) -> tuple[int, str]:
    """Exit code and the one line for an error that reached the top."""
    if isinstance(error, MfextError):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 143 if isinstance(error, _Terminated) else 130, "interrupted"
    if isinstance(error, BrokenPipeError):
        # The reader left (`mfext inspect | head`); python would complain again when it flushes at exit.
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.close()
        return 141, ""
    if isinstance(error, OSError) and error.errno in _REFUSALS:
        return 4, f"the machine refused: {error.filename or 'a file'}: {error.strerror}"
    if isinstance(error, MemoryError) or _is_out_of_memory(error):
        return 4, "not enough memory: a smaller batch_size, sequence_length or model needs less"
    return (
        1,
        f"{type(error).__name__}: {error}: this is a bug in mfext; --debug shows where, `mfext doctor` what to report",
    )


def _is_out_of_memory(error: BaseException) -> bool:
    """torch raises RuntimeErrors of its own when an allocation fails, on CPU and GPU."""
    return isinstance(error, RuntimeError) and (
        type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    )


def _dispatch(words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help", "help"):
        print(help_text())
        return
    if words[0] == "--version":
        print(f"mfext {__version__}")
        return
    verb = find_verb(words[0])
    if verb is None:
        names = [verb.name for verb in VERBS]
        fix = f"known: {', '.join(names)}{did_you_mean(words[0], names)}"
        raise InputError(f"no verb {words[0]!r}", "mfext VERB", fix)
    arguments = parse_arguments(verb, words[1:])
    if arguments.values.pop("help", False):
        print(verb_help(verb))
    elif verb.name == "completion":
        print(_completion(arguments))
    elif verb.takes == "recipe":
        _run_recipes(verb, arguments)
    else:
        _run_request(verb, arguments)


def parse_arguments(verb: Verb, words: Sequence[str]) -> Arguments:
    """Sort the words after the verb into flags' values and `key=value` overrides. Raises InputError."""
    arguments = Arguments()
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word.startswith("-") and len(word) > 1:
            name, equals, inline = word.partition("=") if word.startswith("--") else (word, "", "")
            flag = verb.flag(name)
            if flag is None:
                raise _unknown_flag(verb, name)
            if not flag.takes_value and equals:
                raise InputError(f"{name} takes no value", f"mfext {verb.name}", f"write {name} alone")
            if flag.takes_value and not equals:
                if not rest or (rest[0].startswith("--") and verb.flag(rest[0].partition("=")[0])):
                    raise InputError(
                        f"{name} needs a value", f"mfext {verb.name}", f"{name} {flag.metavar}: {flag.help}"
                    )
                inline = rest.pop(0)
            _store(arguments, flag, inline)
        elif (bare := _next_bare(verb, arguments)) and "=" not in word:
            arguments.values[bare] = word
        elif "=" in word and verb.takes:
            arguments.overrides.append(word)
        else:
            raise InputError(
                f"unexpected argument {word!r}", f"mfext {verb.name}", "expected --flag value or key=value"
            )
    return arguments


def _next_bare(verb: Verb, arguments: Arguments) -> str:
    """The key of the next bare argument; empty where the verb takes no more."""
    return next((key for key in verb.positional.split() if key not in arguments.values), "")


def _unknown_flag(verb: Verb, name: str) -> InputError:
    known = [flag.name for flag in verb.flags]
    return InputError(f"no flag {name}", f"mfext {verb.name}", f"known: {', '.join(known)}{did_you_mean(name, known)}")


def _store(arguments: Arguments, flag: Flag, text: str) -> None:
    values, key = arguments.values, flag.key
    if flag.kind == "count":
        values[key] = values.get(key, 0) + 1
    elif flag.kind == "switch":
        values[key] = True
    elif flag.kind == "many":
        values.setdefault(key, []).append(text)
    elif flag.kind == "group":
        arguments.overrides.append(f"{key}={text}")
    elif key in values:
        raise InputError(f"{flag.name} given twice", f"{values[key]} and {text}", "give it once")
    else:
        values[key] = _value(flag, text)


def _value(flag: Flag, text: str) -> object:
    if text == "":
        raise InputError(f"{flag.name} is empty", flag.name, f"{flag.metavar}: {flag.help}")
    if flag.kind == "list":
        return [part for part in text.split(",") if part]
    try:
        return int(text) if flag.kind == "whole" else float(text) if flag.kind == "number" else text
    except ValueError:
        rule = "a whole number" if flag.kind == "whole" else "a number"
        raise InputError("wrong type", f"{flag.name} {text[:60]}", f"must be {rule}") from None


def _completion(arguments: Arguments) -> str:
    from mfext.recipe import known_domains, known_options, known_recipes

    words = {
        "--domain": list(known_domains()),
        "--recipe": known_recipes(),
        "--method": known_options("method"),
        "--device": ["cpu", "gpu", "auto"],
        "--split": ["validation", "test"],
        "--to": ["int8", "bf16"],
    }
    return completion_script(arguments.values.get("shell", ""), words)


def _run_recipes(verb: Verb, arguments: Arguments) -> None:
    from mfext import recipe

    invocation = _invocation(arguments)
    for key, value in (("trainer.accelerator", invocation.device), ("trainer.threads", invocation.threads)):
        if value is not None:
            arguments.values[key] = value
    name, sweep = arguments.values.pop("recipe", None), arguments.values.pop("multirun", False)
    if invocation.resume is not None:
        each = _resumed(invocation.resume, name, sweep, arguments)
    elif sweep:
        return _run_sweep(verb, name, arguments, invocation)
    elif invocation.jobs != 1 or invocation.array_job is not None:
        raise InputError("--jobs and --array-job are for sweeps", f"mfext {verb.name}", "add -m to run a sweep")
    else:
        each = recipe.load_recipe(verb.name, name, arguments.overrides, arguments.values)
    command = importlib.import_module(verb.module)
    with contextlib.redirect_stdout(sys.stderr):
        report: Report = command.run(each, invocation)
    _print(_complete(report, each.seed, recipe.config_hash(each)), invocation)


def _run_sweep(verb: Verb, recipe_name: str | None, arguments: Arguments, invocation: requests.Invocation) -> None:
    """Run every combination; the report of the whole on stdout, then the first failure, if any, as the exit code."""
    from mfext.commands import sweep

    order = sweep.order_sweep(verb.name, recipe_name, arguments.overrides, arguments.values)
    with contextlib.redirect_stdout(sys.stderr):
        outcome = sweep.run(order, invocation)
    _print(outcome.report, invocation)
    if outcome.failure is not None:
        raise outcome.failure


def _resumed(run: str, name: str | None, sweep: bool, arguments: Arguments) -> Recipe:
    """A resumed run continues with its own recipe; only where it runs may change."""
    from mfext import recipe

    where = {key: value for key, value in arguments.values.items() if key.startswith("trainer.")}
    extra = [*arguments.overrides, *(key for key in arguments.values if key not in where)]
    if name is not None or sweep or extra:
        if sweep:
            raise InputError("a sweep is not resumed", f"--resume {run}", "give the same command with --out FOLDER")
        given = (extra or ["--recipe"])[0]
        raise InputError("a resumed run keeps its recipe", f"--resume {run}", f"remove {given}, or start a new run")
    return recipe.recipe_of_run(Path(run), where)


def _run_request(verb: Verb, arguments: Arguments) -> None:
    from mfext.recipe import check_domain, parse_overrides, set_key

    invocation = _invocation(arguments)
    plain: dict[str, Any] = {}
    for assignment in parse_overrides(arguments.overrides, groups=()):
        set_key(plain, assignment.key, assignment.value)
    for key, value in arguments.values.items():
        set_key(plain, key, value)
    keys = ("model", "to", "domains", "run", "run_a", "run_b", "number")
    needed = next((key for key in keys if _needs(verb, key) and key not in plain), None)
    if needed:
        spelled = next((flag.name for flag in verb.flags if flag.key == needed), needed.upper())
        raise InputError(f"{spelled} is missing", f"mfext {verb.name}", f"for example: {verb.example}")
    request = from_mapping(getattr(requests, verb.takes), plain)
    for key in ("model", "run", "run_a", "run_b"):
        folder = getattr(request, key, None)
        if folder is not None and not Path(folder).expanduser().is_dir():
            raise InputError(f"no such {key.partition('_')[0]} folder", folder, "it must exist")
    for reference in getattr(request, "domains", ()):
        check_domain(reference)
    command = importlib.import_module(verb.module)
    with contextlib.redirect_stdout(sys.stderr):
        report: Report = command.run(request, invocation)
    asked = json.dumps(to_mapping(request), sort_keys=True)
    _print(_complete(report, request.seed, hashlib.sha256(asked.encode()).hexdigest()), invocation)
    if report.failure is not None:
        raise report.failure


def _needs(verb: Verb, key: str) -> bool:
    fields = dataclasses.fields(getattr(requests, verb.takes))
    return any(item.name == key and item.default is dataclasses.MISSING for item in fields)


def _invocation(arguments: Arguments) -> requests.Invocation:
    return from_mapping(requests.Invocation, arguments.take("invocation."))


def _complete(report: Report, seed: int, config_hash: str) -> Report:
    """The keys every verb's JSON carries."""
    data = {"mfext_version": __version__, "seed": seed, "config_hash": config_hash, **report.data}
    return dataclasses.replace(report, data=data)


def _print(report: Report, invocation: requests.Invocation) -> None:
    """The report on stdout: one JSON object, or words."""
    from mfext.report.as_json import to_json
    from mfext.report.terminal import render

    if invocation.json:
        print(to_json(report))
    else:
        render(report, sys.stdout)
