"""Completion scripts for bash, zsh and fish, written out from the table of verbs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mfext.conversion import did_you_mean
from mfext.errors import InputError
from mfext.verbs import VERBS, Verb

SHELLS = ("bash", "zsh", "fish")


def completion_script(shell: str, words: Mapping[str, Sequence[str]]) -> str:
    """The script for one shell. `words` maps a flag to the values known for it ("--domain" to the domains' names)."""
    if shell not in SHELLS:
        fix = f"known: {', '.join(SHELLS)}{did_you_mean(shell, SHELLS)}"
        raise InputError(f"no completion for {shell!r}", "completion", fix)
    return _fish(words) if shell == "fish" else _bash(words, zsh=shell == "zsh")


def _bash(words: Mapping[str, Sequence[str]], zsh: bool) -> str:
    values = [
        f'        {flag}) COMPREPLY=($(compgen -W "{" ".join(known)}" -- "$word")) ;;' for flag, known in words.items()
    ]
    flags = [f'        {verb.name}) flags="{" ".join(_flags(verb))}" ;;' for verb in VERBS]
    lines = [
        *(["autoload -U +X bashcompinit && bashcompinit"] if zsh else []),
        "_mfext() {",
        '    local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" flags=""',
        '    if [ "$COMP_CWORD" -eq 1 ]; then',
        f'        COMPREPLY=($(compgen -W "{" ".join(verb.name for verb in VERBS)}" -- "$word")); return',
        "    fi",
        '    case "$before" in',
        *values,
        "    esac",
        '    [ "${#COMPREPLY[@]}" -gt 0 ] && return',
        '    case "${COMP_WORDS[1]}" in',
        *flags,
        "    esac",
        '    COMPREPLY=($(compgen -W "$flags" -- "$word"))',
        "}",
        "complete -o default -F _mfext mfext",
    ]
    return "\n".join(lines)


def _fish(words: Mapping[str, Sequence[str]]) -> str:
    lines = []
    for verb in VERBS:
        summary = verb.summary.replace("'", "\\'")
        lines.append(f"complete -c mfext -n __fish_use_subcommand -f -a {verb.name} -d '{summary}'")
        for flag in verb.flags:
            known = (
                f" -x -a '{' '.join(words[flag.name])}'" if flag.name in words else " -r" if flag.takes_value else ""
            )
            short = f" -s {flag.short[1:]}" if flag.short else ""
            text = flag.help.replace("'", "\\'")
            when = f"complete -c mfext -n '__fish_seen_subcommand_from {verb.name}'"
            lines.append(f"{when} -l {flag.name[2:]}{short}{known} -d '{text}'")
    return "\n".join(lines)


def _flags(verb: Verb) -> list[str]:
    return [flag.name for flag in verb.flags]
