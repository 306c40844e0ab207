from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

from mfext.domains.standard_library import (
    bare_code,
    bytecode_listing,
    character_names,
    documented,
    help_topics,
    library_folder,
    library_modules,
    long_docstrings,
    parse,
    read_source,
)
from mfext.errors import InputError

SAMPLE = (
    "argparse",
    "ast",
    "dataclasses",
    "decimal",
    "email.message",
    "json.decoder",
    "pathlib",
    "tokenize",
    "typing",
    "uuid",
)

SOURCE = '''#!/usr/bin/env python
"""Module docstring."""

# A comment.
import os  # why


class A:
    """A class."""

    name = "# not a comment"  # a comment

    def only(self):
        """Only a docstring."""

    def one(self): "one line"


# Section

def f(x):
    \'\'\'Doc.

    More # text.
    \'\'\'  # trailing
    y = """kept
# kept too
"""
    return x + y
'''

BARE = '''import os


class A:
    name = "# not a comment"

    def only(self):
        pass

    def one(self): pass


def f(x):
    y = """kept
# kept too
"""
    return x + y
'''


def without_docstrings(source: str) -> str:
    tree = parse(source)
    for node, statement in documented(tree):
        node.body.remove(statement)
        if not node.body and not isinstance(node, ast.Module):
            node.body.append(ast.Pass())
    return ast.dump(tree)


def test_docstrings_and_comments_go_and_all_other_formatting_stays() -> None:
    assert bare_code(SOURCE) == BARE


@pytest.mark.parametrize("module", SAMPLE)
def test_bare_code_means_the_same_and_holds_no_comment(module: str) -> None:
    source = read_source(_path(module))
    bare = bare_code(source)
    assert without_docstrings(source) == ast.dump(parse(bare))
    tokens = tokenize.generate_tokens(io.StringIO(bare).readline)
    assert not [token for token in tokens if token.type == tokenize.COMMENT]
    assert not list(documented(parse(bare)))


def _path(module: str) -> Path:
    path = library_folder() / (module.replace(".", "/") + ".py")
    return path if path.is_file() else path.with_suffix("") / "__init__.py"


def test_an_odd_line_ending_or_a_tab_keeps_code_valid() -> None:
    assert bare_code("def f():\n\t'''Doc'''; x = 1\n\treturn x") == "def f():\n\tpass; x = 1\n\treturn x"
    assert bare_code("# only a comment") == ""
    assert bare_code("x = ('a'  # first\n     'b')\n") == "x = ('a'\n     'b')\n"


def test_tests_and_site_packages_are_left_out() -> None:
    modules = library_modules(library_folder())
    assert {"os", "json", "json.decoder", "importlib._bootstrap"} <= set(modules)
    assert not [name for name in modules if {"test", "tests", "site-packages"} & set(name.split("."))]


def test_an_installation_without_sources_is_refused_with_its_folder(tmp_path: Path) -> None:
    (tmp_path / "os.pyc").write_bytes(b"")
    (tmp_path / "site.py").write_text("x = 1\n")
    with pytest.raises(InputError, match=f"ships 1 standard library sources.*{tmp_path.name}.*installed with its .py"):
        library_modules(tmp_path)
    with pytest.raises(InputError, match="ships no help topics"):
        help_topics(tmp_path)


def test_help_topics_are_read_without_importing_them() -> None:
    topics = help_topics(library_folder())
    assert len(topics) > 60 and 'The "assert" statement' in topics["assert"]


def test_only_long_docstrings_are_prose_and_their_indentation_is_removed() -> None:
    long = "Words of a long docstring that explains at length. " * 3
    source = f'"""Short."""\nclass A:\n    """{long}\n\n    Even.\n        Indented.\n    """\n'
    assert long_docstrings(source) == f"{long}\n\nEven.\n    Indented."


def test_a_listing_names_functions_and_holds_no_address_or_path() -> None:
    listing = bytecode_listing("def f(x):\n    return [y for y in x if y in {'a', 'b'}], lambda: 0\n", "sample")
    assert listing.startswith("Disassembly of sample:\n") and "Disassembly of sample.f:" in listing
    assert "frozenset({'a', 'b'})" in listing
    assert not re.search(r"0x[0-9a-f]{6}", listing) and ".py" not in listing


def test_a_listing_is_the_same_under_every_hash_seed() -> None:
    program = (
        "from mfext.domains.standard_library import *; import hashlib;"
        "path = library_folder() / 'tokenize.py';"
        "print(hashlib.sha256(bytecode_listing(read_source(path), 'tokenize').encode()).hexdigest())"
    )
    root = Path(__file__).parents[2]
    seen = {
        subprocess.run(
            [sys.executable, "-c", program], cwd=root, env={"PYTHONHASHSEED": seed}, check=True, capture_output=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1


def test_character_names_are_lines_by_blocks_without_names_that_repeat_the_number() -> None:
    blocks = character_names()
    assert "U+0041 LATIN CAPITAL LETTER A\n" in blocks["U+0000"]
    assert "U+4E00" not in blocks and "U+AC00" not in blocks
