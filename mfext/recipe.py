"""recipes/ + conf/ + overrides -> Recipe. The only door to Hydra, OmegaConf and YAML.

Under Hydra a stranger's YAML is code: `_target_` and `hydra.*` keys run commands, a 236-byte alias bomb hung it for a
minute, `${oc.env:...}` reads secrets (each measured, hydra-core 1.3.8). So every text is checked before Hydra sees it:
plain keys and values only, no anchors, no tags, no interpolation but a whole value `${a.b}` that names a plain value.

Hydra composes the recipe file and the groups chosen; single keys are set afterwards, with Hydra's own grammar for the
values, so that a key absent from the YAML may be set too and a typing error is answered by the dataclasses.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mfext.config import Recipe
from mfext.conversion import did_you_mean, from_mapping, to_mapping
from mfext.errors import InputError
from mfext.paths import shipped_folder

DEFAULT_RECIPES = {
    "grow": "grow_code",
    "continual": "stream_embedded",
    "pretrain": "pretrain_small",
    "prune": "prune_model",
}
GROUPS = ("model", "growth", "method", "pruning", "training", "trainer", "logger")

_MAX_BYTES = 65_536
_MAX_DEPTH = 16
_MAX_NODES = 4_096
_MAX_OVERRIDES = 256
_FORBIDDEN_KEYS = ("hydra", "_target_", "_args_", "_partial_", "_convert_", "_recursive_")
_INTERPOLATION = re.compile(r"\$\{([A-Za-z][A-Za-z0-9_]*(?:\.[A-Za-z][A-Za-z0-9_]*)*)\}")
_KEY = re.compile(r"[A-Za-z][A-Za-z0-9_]*(?:\.[A-Za-z][A-Za-z0-9_]*)*")
_GROUP_ENTRY = re.compile(r"[a-z][a-z0-9_]*(?:@[a-z][a-z0-9_.]*)?")


@dataclass(frozen=True)
class Assignment:
    """One `key=value` of the command line: a group's choice, or one key of the recipe."""

    key: str
    value: Any
    is_group: bool


def load_recipe(
    verb: str, recipe_name: str | None, overrides: Sequence[str], flags: Mapping[str, object] | None = None
) -> Recipe:
    """Compose, check and freeze one recipe.

    `recipe_name` is a file in recipes/, a path to a YAML file, or None for the verb's own; `overrides` are `key=value`
    texts; `flags` are dotted keys with plain values and win. Raises InputError.
    """
    assignments = parse_overrides(overrides)
    plain = _compose(recipe_name or DEFAULT_RECIPES[verb], [item for item in assignments if item.is_group])
    for item in assignments:
        if not item.is_group:
            set_key(plain, item.key, item.value)
    for key, value in (flags or {}).items():
        set_key(plain, key, value)
    _resolve(plain)
    if verb == "pretrain":
        _pretrain_is_its_base(plain)
    recipe = recipe_from_mapping(plain)
    _check_references(recipe, verb)
    return recipe


def recipe_to_mapping(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain dicts and lists; `recipe_from_mapping` gives an equal recipe back."""
    return to_mapping(recipe)


def recipe_from_mapping(mapping: Mapping[str, Any]) -> Recipe:
    """The checked recipe of a plain mapping, such as a run's recipe.json. Raises InputError."""
    return from_mapping(Recipe, mapping)


def config_hash(recipe: Recipe) -> str:
    """SHA-256 (hex) of everything in the recipe that decides numbers: not `out`, not the loggers."""
    mapping = {key: value for key, value in recipe_to_mapping(recipe).items() if key not in ("out", "logger")}
    return hashlib.sha256(json.dumps(mapping, sort_keys=True).encode()).hexdigest()


def known_domains() -> dict[str, dict[str, Any]]:
    """Name -> settings of every domain in conf/domain/."""
    folder = shipped_folder("conf") / "domain"
    return {path.stem: read_yaml(path) for path in sorted(folder.glob("*.yaml"))}


def check_recipe_verb(verb: str) -> str:
    """Return `verb` if it takes a recipe; its command is the module of that name in commands/. Raises InputError."""
    if verb not in DEFAULT_RECIPES:
        raise InputError(f"no verb {verb!r} takes a recipe", "mfext VERB", f"known: {', '.join(DEFAULT_RECIPES)}")
    return verb


def known_recipes() -> list[str]:
    """Names of the recipes that ship with mfext."""
    return sorted(path.stem for path in shipped_folder("recipes").glob("*.yaml"))


def known_options(group: str) -> list[str]:
    """Names that `group=NAME` accepts."""
    return sorted(path.stem for path in (shipped_folder("conf") / group).glob("*.yaml"))


def parse_overrides(overrides: Sequence[str], groups: Sequence[str] = GROUPS) -> list[Assignment]:
    """`key=value` texts, in Hydra's grammar, as data; a group's choice is checked against conf/. Raises InputError."""
    return [_assignment(override, groups) for override in _parse(overrides)]


def expand_sweep(overrides: Sequence[str]) -> list[list[str]]:
    """Every combination of the overrides' comma lists, choice(...) and range(...): one list of texts per run."""
    parsed = _parse(overrides)
    for override in parsed:
        if override.is_sweep_override() and override.value_type is not None and "GLOB" in override.value_type.name:
            raise InputError("glob sweeps are not supported", _text(override), "list the choices, separated by commas")
    batches = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    return [list(combination) for batch in batches for combination in batch]


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file of plain keys and values, checked as the module's docstring says. Raises InputError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError("cannot read", path, error.strerror or str(error)) from error
    if len(data) > _MAX_BYTES:
        raise InputError("YAML file too large", path, f"{len(data)} bytes; at most {_MAX_BYTES}")
    try:
        text = data.decode()
        _check_events(text, path)
        plain = OmegaConf.to_container(OmegaConf.create(text), resolve=False) if text.strip() else {}
    except UnicodeDecodeError as error:
        raise InputError("not UTF-8", path, f"byte {error.start}") from error
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise InputError("not valid YAML", path, str(error)) from error
    if not isinstance(plain, dict):
        raise InputError("expected keys and values at the top", path)
    return {str(key): value for key, value in plain.items()}


def set_key(plain: dict[str, Any], key: str, value: object) -> None:
    """Set the dotted `key` in nested dicts, making those that are absent. Raises InputError."""
    *parents, last = key.split(".")
    inner = plain
    for parent in parents:
        step = inner.setdefault(parent, {})
        if not isinstance(step, dict):
            raise InputError("unknown key", key, f"{parent} is a value, not a group of keys")
        inner = step
    inner[last] = value


def _check_events(text: str, path: Path) -> None:
    """Refuse anchors, aliases, tags, several documents, forbidden keys, odd interpolations and runaway sizes."""
    depth = nodes = documents = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        where = f"{path}:{event.start_mark.line + 1}" if event.start_mark else str(path)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise InputError("anchors and aliases are not allowed", where, "write the value out")
        if tag := getattr(event, "tag", None):
            raise InputError("tags are not allowed", where, f"remove {tag}")
        documents += isinstance(event, yaml.DocumentStartEvent)
        nodes += isinstance(event, yaml.NodeEvent)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH or nodes > _MAX_NODES or documents > 1:
            limits = f"at most {_MAX_DEPTH} levels, {_MAX_NODES} values, one document"
            raise InputError("YAML too large or too deep", where, limits)
        if isinstance(event, yaml.ScalarEvent):
            _check_text(event.value, where)


def _check_text(text: str, where: str) -> None:
    """Refuse a key or value that Hydra or OmegaConf would act on."""
    first = re.split(r"[./@]", text.removeprefix("override ").strip().lstrip("/"), maxsplit=1)[0]
    if first in _FORBIDDEN_KEYS:
        raise InputError(f"{first!r} is not allowed", where, "a recipe holds plain keys and values, nothing that runs")
    if "${" in text and _INTERPOLATION.fullmatch(text) is None:
        raise InputError("interpolation not allowed", where, f"{text[:60]!r}: only a whole value ${{key.key}}")


def _parse(overrides: Sequence[str]) -> list[Override]:
    if len(overrides) > _MAX_OVERRIDES or sum(map(len, overrides)) > _MAX_BYTES:
        raise InputError("too many overrides", "command line", f"at most {_MAX_OVERRIDES} and {_MAX_BYTES} characters")
    parsed = []
    for text in overrides:
        _check_text(text.lstrip("+~").partition("=")[0], text)
        _check_text(text.partition("=")[2], text)
        try:
            parsed.append(OverridesParser.create().parse_override(text))
        except (HydraException, OmegaConfBaseException, ValueError, RecursionError) as error:
            raise InputError(
                "cannot read override", text, "expected key=value; quote a value with odd signs"
            ) from error
    return parsed


def _text(override: Override) -> str:
    return override.input_line or str(override.key_or_group)


def _assignment(override: Override, groups: Sequence[str]) -> Assignment:
    text, key = _text(override), override.key_or_group
    if override.is_sweep_override():
        raise InputError("several values", text, "add -m to run each, or write a list as key=[a,b]")
    if override.is_delete():
        raise InputError("cannot remove a key", text, "set it to another value")
    if override.package is not None or _KEY.fullmatch(key) is None:
        raise InputError("bad key", text, "expected names joined by dots, such as training.tokens=1_000_000")
    value = override.value()
    if key in groups:
        options = known_options(key)
        if not isinstance(value, str) or value not in options:
            hint = did_you_mean(str(value), options)
            raise InputError(f"no {key} {str(value)!r}", text, f"known: {', '.join(options)}{hint}")
        return Assignment(key, value, is_group=True)
    return Assignment(key, _plain_value(value, text), is_group=False)


def _plain_value(value: object, text: str) -> object:
    """Hydra's parsed value as plain data (its quoted strings are objects of their own)."""
    if isinstance(value, list):
        return [_plain_value(item, text) for item in value]
    if isinstance(value, dict):
        for key in value:
            _check_text(str(key), text)
        return {str(key): _plain_value(item, text) for key, item in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def _compose(recipe_name: str, groups: Iterable[Assignment]) -> dict[str, Any]:
    """The recipe file with its groups, not yet resolved."""
    source = _recipe_file(recipe_name)
    own = read_yaml(source)
    present = _check_defaults(own.get("defaults", []), source)
    conf = shipped_folder("conf")
    overrides = [f"{'' if group.key in present else '+'}{group.key}={group.value}" for group in groups]
    quoted = "'file://" + str(conf).replace("\\", "\\\\").replace("'", "\\'") + "'"
    try:
        # What was read, written out again alone in a folder: no other YAML beside a stranger's recipe can be pulled in
        # by name, and no `# @package hydra` comment survives.
        with tempfile.TemporaryDirectory(prefix="mfext-") as folder:
            OmegaConf.save(OmegaConf.create(own), Path(folder) / "recipe.yaml")
            with initialize_config_dir(folder, job_name="mfext", version_base="1.3"):
                composed = compose("recipe", overrides=[*overrides, f"hydra.searchpath=[{quoted}]"])
        plain = OmegaConf.to_container(composed, resolve=False)
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError("cannot compose recipe", source, str(error).splitlines()[0]) from error
    assert isinstance(composed, DictConfig) and isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _recipe_file(name: str) -> Path:
    if name.endswith((".yaml", ".yml")) or "/" in name:
        path = Path(name).expanduser()
        if not path.is_file():
            raise InputError("no such recipe file", name, f"shipped recipes: {', '.join(known_recipes())}")
        return path
    known = known_recipes()
    if name not in known:
        raise InputError(f"no recipe {name!r}", "--recipe", f"known: {', '.join(known)}{did_you_mean(name, known)}")
    return shipped_folder("recipes") / f"{name}.yaml"


def _check_defaults(defaults: object, source: Path) -> list[str]:
    """The groups in a recipe's `defaults`, which may name options of conf/ and nothing else."""
    present = []
    rule = "each entry is '- GROUP: OPTION' or '- _self_'"
    if not isinstance(defaults, list):
        raise InputError("bad defaults list", source, rule)
    for entry in defaults:
        if entry == "_self_":
            continue
        if not isinstance(entry, dict) or len(entry) != 1:
            raise InputError("bad defaults list", source, f"{entry!r}: {rule}")
        group, option = next(iter(entry.items()))
        name, _, package = str(group).partition("@")
        if _GROUP_ENTRY.fullmatch(str(group)) is None or name not in GROUPS or package.startswith("hydra"):
            hint = did_you_mean(name, GROUPS)
            raise InputError(f"no group {group!r}", source, f"known: {', '.join(GROUPS)}{hint}")
        options = known_options(name)
        if option not in options:
            hint = did_you_mean(str(option), options)
            raise InputError(f"no {name} {option!r}", source, f"known: {', '.join(options)}{hint}")
        present.append(str(group))
    return present


def _resolve(plain: dict[str, Any]) -> None:
    """Put plain values in place of `${a.b}`. One that names another, or a group, is refused: no chains, no bombs."""

    def resolved(value: object, path: str) -> object:
        if isinstance(value, dict):
            return {key: resolved(item, f"{path}.{key}" if path else str(key)) for key, item in value.items()}
        if isinstance(value, list):
            return [resolved(item, path) for item in value]
        match = _INTERPOLATION.fullmatch(value) if isinstance(value, str) else None
        if match is None:
            return value
        target: object = plain
        for part in match.group(1).split("."):
            target = target.get(part) if isinstance(target, dict) else None
        if target is None or isinstance(target, (dict, list)) or (isinstance(target, str) and "${" in target):
            raise InputError("bad interpolation", f"{path}={value}", "it must name a plain value of this recipe")
        return target

    plain.update({key: resolved(value, key) for key, value in plain.items()})


def _pretrain_is_its_base(plain: dict[str, Any]) -> None:
    """`pretrain` trains `model` with `training` on `domain`: say so in the words of `default_base`."""
    base = plain.setdefault("default_base", {})
    for key, own in (("domains", "domain"), ("training", "training")):
        if isinstance(base, dict) and key in base:
            raise InputError("unknown key", f"default_base.{key}", f"pretrain's own key is {own}")
    if isinstance(base, dict):
        base["domains"] = plain.get("domain", Recipe().domain)
        base["training"] = plain.get("training", {})


def _check_references(recipe: Recipe, verb: str) -> None:
    """Names and folders that can be wrong are found now, not after torch has loaded."""
    domains = (*recipe.default_base.domains, *recipe.bystanders)
    own = {"pretrain": (), "grow": (recipe.domain,), "prune": (recipe.domain,), "continual": recipe.domains}[verb]
    for reference in (*own, *domains):
        check_domain(reference)
    if recipe.base is not None and not Path(recipe.base).expanduser().is_dir():
        raise InputError("no such model or run folder", f"base={recipe.base}")
    if recipe.tokenizer != "bytes" and not Path(recipe.tokenizer).expanduser().exists():
        raise InputError(
            "no such tokenizer", f"tokenizer={recipe.tokenizer}", "'bytes', a tokenizer.json or its folder"
        )


def check_domain(reference: str) -> None:
    """Raise InputError where a domain is neither a known name, nor a folder, nor hf:owner/name[:config]."""
    if reference.startswith("hf:"):
        if re.fullmatch(r"hf:[\w.-]+/[\w.-]+(:[\w.-]+)?", reference) is None:
            raise InputError(
                "bad dataset name", f"domain={reference}", "expected hf:owner/name or hf:owner/name:config"
            )
        return
    if Path(reference).expanduser().is_dir():
        return
    if "/" in reference or reference.startswith((".", "~")):
        raise InputError(
            "no such folder", f"domain={reference}", "it holds train, validation, test as .jsonl, .txt or .parquet"
        )
    known = known_domains()
    if reference not in known:
        hint = did_you_mean(reference, known)
        fix = f"known: {', '.join(known)}, a folder, or hf:owner/name{hint}"
        raise InputError(f"no domain {reference!r}", "domain", fix)


def recipe_of_run(run: Path, changes: Mapping[str, object]) -> Recipe:
    """The recipe an interrupted run was started with; `changes` are dotted keys of where it runs. Raises InputError."""
    path = run.expanduser() / "recipe.json"
    try:
        plain = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise InputError("not a run folder", run, "there is no recipe.json in it") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError("cannot read recipe.json", path, str(error)) from error
    if isinstance(plain, dict) and isinstance(plain.get("recipe"), dict):
        plain = plain["recipe"]
    if isinstance(plain, dict):
        for key, value in changes.items():
            set_key(plain, key, value)
    return recipe_from_mapping(plain)
