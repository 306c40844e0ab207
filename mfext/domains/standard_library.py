"""The text in a Python installation: module sources, docstrings, help topics, bytecode, character names.

Everything is read from files and compiled at most; no module of the standard library is
imported for its text, so nothing in it runs.
"""

from __future__ import annotations

import ast
import dis
import importlib.util
import inspect
import os
import re
import sysconfig
import unicodedata
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import CodeType

from mfext.errors import InputError

# Tests and their data, tables of character maps, and files written by the build of this one installation.
EXCLUDED_FOLDERS = frozenset(
    (
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "__pycache__",
        "encodings",
        "pydoc_data",
        "lib-dynload",
    )
)
EXCLUDED_FILES = ("_sysconfigdata", "sitecustomize", "usercustomize")
FEWEST_MODULES = 200  # a full standard library has 500 and more
FEWEST_DOCSTRING_CHARACTERS = 100
FEWEST_PARAGRAPH_WORDS = 10
PLAIN_WORDS_SHARE = 0.9
PLAIN_WORD = re.compile(r"[(\"'*]*[A-Za-z][A-Za-z'’-]*[,.;:!?)\"'*]*")
LONGEST_CONSTANT = 200

STRING_OR_COMMENT = re.compile(
    rb'"""[^"\\]*(?:(?:\\.|"(?!""))[^"\\]*)*"""'
    rb"|'''[^'\\]*(?:(?:\\.|'(?!''))[^'\\]*)*'''"
    rb'|"[^"\\\n]*(?:\\.[^"\\\n]*)*"'
    rb"|'[^'\\\n]*(?:\\.[^'\\\n]*)*'"
    rb"|(#[^\n]*)",
    re.DOTALL,
)
BLANK_LINES = re.compile(rb"(?:[ \t\f]*\n)*")
# Where statements hold further statements; expressions are not searched.
BLOCKS: Mapping[type[ast.AST], tuple[str, ...]] = {
    **dict.fromkeys((ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef), ("body",)),
    **dict.fromkeys((ast.With, ast.AsyncWith, ast.ExceptHandler, ast.match_case), ("body",)),
    **dict.fromkeys((ast.If, ast.For, ast.AsyncFor, ast.While), ("orelse", "body")),
    **dict.fromkeys((ast.Try, ast.TryStar), ("finalbody", "orelse", "handlers", "body")),
    ast.Match: ("cases",),
}
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def library_folder() -> Path:
    """Where this Python keeps its standard library."""
    return Path(sysconfig.get_path("stdlib"))


def library_modules(folder: Path) -> dict[str, Path]:
    """Source file by module name, such as "os" or "json.decoder", tests left out.

    Raises InputError where the installation ships too few sources (compiled only, or zipped).
    """
    modules: dict[str, Path] = {}
    for place, folders, files in os.walk(folder):
        # Pruned here: walking all of site-packages took 1.5 s of the 5 s an extraction needs.
        folders[:] = sorted(name for name in folders if name not in EXCLUDED_FOLDERS and not name.startswith("config-"))
        package = Path(place).relative_to(folder).parts
        for file in sorted(files):
            if file.endswith(".py") and not file.startswith(EXCLUDED_FILES):
                module = ".".join((*package, file.removesuffix(".py"))).removesuffix(".__init__")
                modules[module] = Path(place, file)
    if len(modules) < FEWEST_MODULES:
        raise InputError(
            f"this Python ships {len(modules)} standard library sources, not enough for an embedded domain",
            folder,
            "use a Python installed with its .py files, or give a folder or hf:owner/name as the domain",
        )
    return modules


def read_source(path: Path) -> str:
    """A module's source with its declared encoding and universal newlines."""
    try:
        return importlib.util.decode_source(path.read_bytes())
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise InputError("cannot read a standard library source", path, str(error)) from error


def parse(source: str) -> ast.Module:
    """The syntax tree; warnings about the library's own style are silenced."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(source)


def documented(tree: ast.Module) -> Iterator[tuple[Documented, ast.Expr]]:
    """Every module, class and function that has a docstring, with the docstring's statement."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, Documented) and node.body:
            match node.body[0]:
                case ast.Expr(value=ast.Constant(value=str())) as statement:
                    yield node, statement
        for name in BLOCKS.get(type(node), ()):
            pending.extend(reversed(getattr(node, name)))


def bare_code(source: str) -> str:
    """The source without docstrings and comments; all other formatting stays.

    A body that was only a docstring becomes `pass`. Blank lines that stood around a removed
    line are joined.
    """
    content = source.encode()
    starts = [0, *(match.end() for match in re.finditer(rb"\n", content))]
    edits: list[tuple[int, int, bytes]] = []
    for node, statement in documented(parse(source)):
        first = starts[statement.lineno - 1] + statement.col_offset
        last = starts[(statement.end_lineno or statement.lineno) - 1] + (statement.end_col_offset or 0)
        alone = len(node.body) == 1 and not isinstance(node, ast.Module)
        edits.append((first, last, b"pass" if alone or not _fills_its_lines(content, first, last) else b""))
    found = STRING_OR_COMMENT.finditer(content)
    edits.extend((match.start(1), match.end(1), b"") for match in found if match[1] is not None)
    return _apply(content, sorted(edits)).decode()


def _fills_its_lines(content: bytes, first: int, last: int) -> bool:
    before = content[content.rfind(b"\n", 0, first) + 1 : first]
    end = content.find(b"\n", last)
    after = content[last : end if end >= 0 else len(content)].strip()
    return not before.strip() and (not after or after.startswith(b"#"))


def _apply(content: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    kept = bytearray()
    position = 0
    for first, last, replacement in edits:
        if first < position:
            continue
        line = content.rfind(b"\n", 0, first) + 1
        if replacement or content[line:first].strip():
            kept += content[position:first].rstrip(b" \t") if not replacement else content[position:first]
            kept += replacement
            position = last
            continue
        kept += content[position:line]
        end = content.find(b"\n", last)
        position = end + 1 if end >= 0 else len(content)
        if content[first : first + 1] != b"#" or not kept or kept.endswith(b"\n\n"):
            blank = BLANK_LINES.match(content, position)
            assert blank is not None
            position = blank.end()
    kept += content[position:]
    return bytes(kept.lstrip(b"\n"))


def long_docstrings(source: str) -> str:
    """A module's docstrings of at least 100 characters, indentation removed, blank lines between."""
    found = (inspect.cleandoc(str(ast.literal_eval(statement.value))) for _, statement in documented(parse(source)))
    return "\n\n".join(text for text in found if len(text) >= FEWEST_DOCSTRING_CHARACTERS)


def flowing_text(text: str) -> str:
    """The paragraphs that are running text (at least ten words, 90 % of them plain), one line each.

    Examples, grammar rules, tables and signatures go, and hard-wrapped lines are joined: a model
    that has read those has read code.
    """
    paragraphs = (each.split() for each in re.split(r"\n[ \t]*\n", text))
    return "\n\n".join(" ".join(words) for words in paragraphs if _is_running_text(words))


def _is_running_text(words: list[str]) -> bool:
    plain = sum(PLAIN_WORD.fullmatch(word) is not None for word in words)
    return len(words) >= FEWEST_PARAGRAPH_WORDS and plain >= PLAIN_WORDS_SHARE * len(words)


def help_topics(folder: Path) -> dict[str, str]:
    """The texts behind `help("topic")`, read from pydoc_data/topics.py without importing it."""
    path = folder / "pydoc_data" / "topics.py"
    if not path.is_file():
        raise InputError("this Python ships no help topics", path, "use a full installation, or another domain")
    for statement in parse(read_source(path)).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            topics: dict[str, str] = ast.literal_eval(statement.value)
            return topics
    raise InputError("no help topics found", path, "the file's layout is not the one of Python 3.11-3.13")


def bytecode_listing(source: str, module: str) -> str:
    """The module compiled (docstrings and asserts left out) and disassembled, one section a function.

    Memory addresses, paths and the order of sets, which change from run to run, do not appear.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = compile(source, f"<{module}>", "exec", dont_inherit=True, optimize=2)
    return "\n".join(_listings(code, module))


def _listings(code: CodeType, name: str) -> Iterator[str]:
    lines = [f"Disassembly of {name}:"]
    line_before: int | None = None
    for instruction in dis.get_instructions(code):
        line = instruction.positions.lineno if instruction.positions else None
        shown = str(line) if line is not None and line != line_before else ""
        line_before = line
        argument = instruction.argrepr
        if instruction.opcode in dis.hasconst:
            argument = _constant(instruction.argval)
        number = "" if instruction.arg is None else str(instruction.arg)
        meaning = f"({argument})" if argument else ""
        line_text = f"{shown:>5} {instruction.offset:>6} {instruction.opname:<24} {number:>5} {meaning}"
        lines.append(line_text.rstrip())
    yield "\n".join(lines) + "\n"
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _listings(constant, f"{name}.{constant.co_name}")


def _constant(value: object) -> str:
    text = _stable(value)
    return text if len(text) <= LONGEST_CONSTANT else text[: LONGEST_CONSTANT - 3] + "..."


def _stable(value: object) -> str:
    if isinstance(value, CodeType):
        return f"<code object {value.co_name}>"
    if isinstance(value, frozenset):
        return "frozenset({" + ", ".join(sorted(_stable(item) for item in value)) + "})"
    if isinstance(value, tuple):
        return "(" + ", ".join(_stable(item) for item in value) + ("," if len(value) == 1 else "") + ")"
    return ascii(value)


def character_names() -> dict[str, str]:
    """Lines "U+0041 LATIN CAPITAL LETTER A" by blocks of 256 characters.

    Names that only repeat the number (CJK ideographs) and Hangul syllables are left out.
    """
    blocks: dict[str, list[str]] = {}
    for number in range(0x110000):
        name = unicodedata.name(chr(number), "")
        if name and not name.startswith("HANGUL SYLLABLE ") and not name.endswith(f"-{number:04X}"):
            blocks.setdefault(f"U+{number & ~0xFF:04X}", []).append(f"U+{number:04X} {name}\n")
    return {block: "".join(lines) for block, lines in blocks.items()}
