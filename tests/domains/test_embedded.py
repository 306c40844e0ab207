from __future__ import annotations

import ast
from pathlib import Path

import pytest
import yaml

import mfext.domains.embedded as embedded
from mfext.domains.domain import SPLITS, check_no_overlap, num_bytes
from mfext.domains.embedded import EXTRACTORS, EmbeddedSettings, extract, load_embedded
from mfext.domains.standard_library import library_folder
from mfext.errors import InputError, MachineError

CONF = Path(__file__).parents[2] / "conf" / "domain"
SMALL = EmbeddedSettings("unicode_names", max_bytes=400_000, piece_bytes=8000)
MEGABYTES = {"code": (4.5, 5.0), "prose": (1.0, 1.4), "unicode_names": (0.9, 1.5), "bytecode": (1.7, 2.0)}


def read_settings(name: str) -> EmbeddedSettings:
    path = CONF / f"{name}.yaml"
    return EmbeddedSettings.from_mapping(yaml.safe_load(path.read_text()), path)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("embedded")


def test_every_embedded_domain_has_its_file_in_conf() -> None:
    assert {path.stem for path in CONF.glob("*.yaml")} == set(EXTRACTORS)
    assert all(read_settings(name).name == name and read_settings(name).description for name in EXTRACTORS)


@pytest.mark.parametrize("name", sorted(MEGABYTES))
def test_an_embedded_domain_has_its_size_and_splits_that_share_nothing(name: str, cache: Path) -> None:
    domain = load_embedded(read_settings(name), cache)
    sizes = {split: num_bytes(domain.split(split)) for split in SPLITS}
    low, high = MEGABYTES[name]
    assert low * 1e6 <= sum(sizes.values()) <= high * 1e6
    for split in ("validation", "test"):
        assert 0.03 < sizes[split] / sum(sizes.values()) < 0.08
        assert len(domain.split(split)) >= 5
    everything = [document for split in SPLITS for document in domain.split(split)]
    assert len(set(everything)) == len(everything)
    check_no_overlap((domain,))
    assert domain.provenance["python"].startswith("3.") and len(domain.provenance["train_sha256"]) == 64
    assert load_embedded(read_settings(name), cache) == domain


def test_code_holds_no_docstring_or_comment_line(cache: Path) -> None:
    documents = load_embedded(read_settings("code"), cache).validation
    parsed = 0
    for document in documents:
        try:
            tree = ast.parse(document)
        except SyntaxError:
            continue  # a piece of a class too long for one document
        parsed += 1
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        assert not any(ast.get_docstring(node) for node in functions)
    assert parsed > 0.6 * len(documents)


def test_a_source_is_in_one_split_and_the_same_one_in_every_domain() -> None:
    homes: dict[str, set[str]] = {}
    for settings in (EmbeddedSettings("bytecode", 300_000, 5000), EmbeddedSettings("unicode_names", 600_000, 8000)):
        for piece in extract(settings, library_folder()):
            homes.setdefault(piece.name.split("#")[0], set()).add(piece.split)
    assert len(homes) > 30 and all(len(splits) == 1 for splits in homes.values())


@pytest.mark.parametrize("damage", ["truncated", "flipped", "garbage", "emptied"])
def test_a_damaged_cache_is_rebuilt(damage: str, tmp_path: Path) -> None:
    domain = load_embedded(SMALL, tmp_path)
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[-100] ^= 1
    damaged = {"truncated": content[: len(content) // 2], "garbage": b"\xff\x00{", "emptied": b""}
    path.write_bytes(damaged.get(damage, content))
    assert load_embedded(SMALL, tmp_path) == domain
    assert path.stat().st_size > 1000 and [path] == list(tmp_path.iterdir())


def test_the_cache_is_used_and_kept_apart_by_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    domain = load_embedded(SMALL, tmp_path)
    load_embedded(EmbeddedSettings("unicode_names", 500_000, 8000), tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr(embedded, "extract", None)
    assert load_embedded(SMALL, tmp_path) == domain


def test_a_cache_folder_that_is_a_file_is_a_machine_error(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(MachineError, match="cannot write a cache file"):
        load_embedded(SMALL, tmp_path / "cache")


def test_a_python_without_sources_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "library_folder", lambda: tmp_path)
    with pytest.raises(InputError, match="ships 0 standard library sources"):
        load_embedded(EmbeddedSettings("code", 1000, 1000))


def test_a_cap_too_small_for_all_splits_is_refused() -> None:
    with pytest.raises(InputError, match="empty split: max_bytes=20000"):
        load_embedded(EmbeddedSettings("unicode_names", 20_000, 8000))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_bytes": "5MB"}, "max_bytes='5MB'"),
        ({"piece_bytes": True}, "piece_bytes=True"),
        ({"max_bytes": 0}, "max_bytes=0"),
        ({"kind": "folder"}, "must be embedded"),
        ({"name": "cod"}, "must be one of bytecode, code"),
        ({"size": 3}, "unknown key 'size'"),
    ],
)
def test_a_wrong_key_or_value_in_a_domain_file_is_named(change: dict[str, object], message: str) -> None:
    values = {"name": "code", "kind": "embedded", "max_bytes": 1000, "piece_bytes": 100, **change}
    with pytest.raises(InputError, match=message):
        EmbeddedSettings.from_mapping(values, "conf/domain/code.yaml")
