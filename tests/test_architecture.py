"""The law of CONTRIBUTING.md, read from the source by ast and checked."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted([*ROOT.glob("mfext/**/*.py"), *ROOT.glob("kernels/mfext_kernels/**/*.py")])

# Higher may import lower; rooms on one level are siblings and may not import each other.
LEVELS = {
    "mfext_kernels": 0,
    "errors": 1,
    "paths": 1,
    "process": 1,
    "config": 1,
    "conversion": 2,
    "requests": 2,
    "model": 3,
    "recipe": 4,
    "report": 4,
    "store": 4,
    "growth": 4,
    "training": 4,
    "domains": 4,
    "metrics": 4,
    "hub": 4,
    "commands": 5,
    "verbs": 6,
    "completion": 7,
    "cli": 8,
    "__main__": 9,
    "": 9,
}
# A store file records lineage as a plan; the LightningModule offers growing and freezing as methods of its own.
ALLOWED_SIBLINGS = (("mfext/store", "mfext.growth.plan"), ("mfext/training/module.py", "mfext.growth."))

DOORS = {
    "hydra": ("mfext/recipe.py",),
    "omegaconf": ("mfext/recipe.py",),
    "yaml": ("mfext/recipe.py",),
    "rich": ("mfext/report/",),
    "jinja2": ("mfext/report/",),
    "matplotlib": ("mfext/report/",),
    "datasets": ("mfext/domains/sources.py", "mfext/domains/tokenizer.py"),
    "tokenizers": ("mfext/domains/sources.py", "mfext/domains/tokenizer.py"),
    "pyarrow": ("mfext/domains/sources.py",),
    "lightning": ("mfext/training/",),
    "pytorch_lightning": (),
    "torchmetrics": ("mfext/metrics/",),
    "safetensors": ("mfext/store",),
    "torchao": ("mfext/store_weights.py",),
    "transformers": ("mfext/hub/",),
    "triton": ("kernels/mfext_kernels/",),
    # Only in memory, through pipes between our own processes; never to or from a file.
    "pickle": ("mfext/training/processes.py",),
    "argparse": (),
}


def name_of(path: Path) -> str:
    """The dotted module name of a source file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The room a module lives in: `mfext.model.router` -> `model`, `mfext.store_files` -> `store`."""
    if module.split(".")[0] == "mfext_kernels":
        return "mfext_kernels"
    room = [*module.split("."), ""][1]
    return room.split("_")[0] if room.split("_")[0] in ("config", "store") else room


MODULES = {name_of(path): path for path in FILES}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def nodes(tree: ast.AST, runtime_only: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if runtime_only and is_type_checking(node):
            continue
        yield node
        yield from nodes(node, runtime_only)


def imports(path: Path, runtime_only: bool = False) -> Iterator[tuple[int, str]]:
    """(line, imported module) of every import; `from p import m` names `p.m` where that is a module."""
    for node in nodes(parsed(path), runtime_only):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            for alias in node.names:
                longer = f"{node.module}.{alias.name}"
                yield node.lineno, longer if longer in MODULES else str(node.module)


def shown(path: Path, line: int, text: str) -> str:
    return f"{path.relative_to(ROOT)}:{line}: {text}"


def test_every_file_lives_in_a_known_room() -> None:
    assert FILES
    assert not [name for name in MODULES if room_of(name) not in LEVELS]


def test_imports_go_downwards_only_and_siblings_stay_apart() -> None:
    wrong = []
    for path in FILES:
        own = room_of(name_of(path))
        for line, module in imports(path):
            if module.split(".")[0] not in ("mfext", "mfext_kernels"):
                continue
            other = room_of(module)
            root_names = other == "" and own in ("cli", "__main__", "commands")
            if own == other or root_names or is_allowed_sibling(path, module):
                continue
            if own == "" or LEVELS[other] >= LEVELS[own]:
                lazily_named = own == "" and is_only_for_types(path, line)
                if not lazily_named:
                    wrong.append(shown(path, line, f"{own} imports {module}"))
    assert not wrong, "\n".join(wrong)


def is_allowed_sibling(path: Path, module: str) -> bool:
    own = str(path.relative_to(ROOT))
    return any(own.startswith(prefix) and module.startswith(target) for prefix, target in ALLOWED_SIBLINGS)


def is_only_for_types(path: Path, line: int) -> bool:
    return line not in {number for number, _ in imports(path, runtime_only=True)}


def test_kernels_never_import_mfext() -> None:
    wrong = [
        shown(path, line, module)
        for path in FILES
        for line, module in imports(path)
        if room_of(name_of(path)) == "mfext_kernels" and module.split(".")[0] == "mfext"
    ]
    assert not wrong, "\n".join(wrong)


def test_there_are_no_import_cycles() -> None:
    graph = {
        name: {module for _, module in imports(path, runtime_only=True) if module in MODULES} - {name}
        for name, path in MODULES.items()
    }
    while graph:
        leaves = {name for name, targets in graph.items() if not targets}
        assert leaves, f"a cycle among {sorted(graph)}"
        graph = {name: targets - leaves for name, targets in graph.items() if name not in leaves}


@pytest.mark.parametrize("package", sorted(DOORS))
def test_each_package_has_one_door(package: str) -> None:
    wrong = [
        shown(path, line, module)
        for path in FILES
        for line, module in imports(path)
        if module.split(".")[0] == package and not str(path.relative_to(ROOT)).startswith(DOORS[package])
    ]
    assert not wrong, "\n".join(wrong)


def test_names_are_imported_from_the_file_that_defines_them() -> None:
    wrong = [
        shown(path, line, f"imports from the package {module}")
        for path in FILES
        for line, module in imports(path)
        if module.startswith("mfext.") and MODULES.get(module, Path()).name == "__init__.py"
    ]
    assert not wrong, "\n".join(wrong)


def test_package_inits_hold_only_a_docstring() -> None:
    wrong = []
    for path in FILES:
        if path.name == "__init__.py" and path.parent != ROOT / "mfext" and "mfext_kernels" not in path.parts:
            body = parsed(path).body
            if len(body) != 1 or ast.get_docstring(parsed(path)) is None:
                wrong.append(shown(path, 1, "more than a docstring"))
    assert not wrong, "\n".join(wrong)


def test_files_are_at_most_400_lines_and_named_for_their_job() -> None:
    wrong = [shown(path, count, "lines") for path in FILES if (count := len(path.read_text().splitlines())) > 400]
    vague = {"utils", "util", "helpers", "helper", "common", "misc", "base"}
    wrong += [shown(path, 1, "a vague name") for path in FILES if path.stem in vague or path.parent.name in vague]
    assert not wrong, "\n".join(wrong)


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    if path.name not in ("triton.py", "triton_kernels.py", "wide_kernels.py"):
        for node in ast.walk(parsed(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield node


def test_functions_are_at_most_60_lines_and_take_at_most_6_parameters() -> None:
    wrong = []
    for path in FILES:
        for function in functions(path):
            length = (function.end_lineno or function.lineno) - function.lineno + 1
            arguments = function.args
            names = [item.arg for item in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
            count = len([name for name in names if name not in ("self", "cls", "ctx")])
            if length > 60:
                wrong.append(shown(path, function.lineno, f"{function.name} has {length} lines"))
            if count > 6:
                wrong.append(shown(path, function.lineno, f"{function.name} takes {count} parameters"))
    assert not wrong, "\n".join(wrong)


def test_nothing_passes_keyword_arguments_through() -> None:
    wrong = [
        shown(path, function.lineno, f"{function.name}(**{function.args.kwarg.arg})")
        for path in FILES
        for function in functions(path)
        if function.args.kwarg is not None
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_swallows_every_exception() -> None:
    wrong = []
    for path in FILES:
        for node in ast.walk(parsed(path)):
            if not isinstance(node, ast.ExceptHandler):
                continue
            everything = node.type is None or (
                isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")
            )
            reraises = any(isinstance(inner, ast.Raise) and inner.exc is None for inner in node.body)
            if everything and not reraises:
                wrong.append(shown(path, node.lineno, "catches everything"))
    assert not wrong, "\n".join(wrong)


def test_nothing_evaluates_text_or_unpickles() -> None:
    wrong = []
    for path in FILES:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                unsafe = called == "torch.load" and not any(
                    item.arg == "weights_only" and isinstance(item.value, ast.Constant) and item.value.value is True
                    for item in node.keywords
                )
                if called in ("eval", "exec") or unsafe:
                    wrong.append(shown(path, node.lineno, called))
    assert not wrong, "\n".join(wrong)


def test_the_command_line_imports_nothing_heavy() -> None:
    heavy = ("torch", "lightning", "triton", "datasets", "hydra", "omegaconf", "numpy", "rich")
    code = f"import mfext.cli, mfext, sys; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_recipes_need_no_torch() -> None:
    code = "import mfext.recipe, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
