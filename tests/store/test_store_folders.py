"""Committed folders: whole or not at all, and nothing read that was not committed."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mfext.errors import DamagedError, InputError, MachineError
from mfext.store_files import TEMPORARY_PREFIX, remove_stale, write_file_atomically, write_new_file
from mfext.store_folders import MANIFEST_NAME, Manifest, commit_folder, verify_folder
from mfext.store_json import seal, unseal


def write_two(folder: Path) -> None:
    write_new_file(folder / "numbers.bin", bytes(range(256)) * 4)
    write_new_file(folder / "note.json", b'{"a": 1}\n')


def commit(target: Path) -> Manifest:
    return commit_folder(target, write_two, kind="sample", metadata={"seed": 3}, parent="p", config_hash="c")


def reseal(folder: Path, **changes: object) -> None:
    """Rewrite the manifest as an attacker would: other content, valid seal."""
    path = folder / MANIFEST_NAME
    path.write_bytes(seal({**unseal(path.read_bytes(), path), **changes}))


def is_one_line(error: pytest.ExceptionInfo[InputError | MachineError], *parts: object) -> bool:
    text = str(error.value)
    return "\n" not in text and all(str(part) in text for part in parts)


def test_a_committed_folder_verifies_and_says_what_it_is(tmp_path: Path) -> None:
    manifest = commit(tmp_path / "pack")
    again = verify_folder(tmp_path / "pack", "sample")
    assert again == manifest
    assert (again.kind, again.parent, again.config_hash, again.metadata) == ("sample", "p", "c", {"seed": 3})
    assert again.files["numbers.bin"].size_bytes == 1024
    assert set(os.listdir(tmp_path)) == {"pack"}


def test_the_manifest_names_no_host_and_no_path(tmp_path: Path) -> None:
    commit(tmp_path / "pack")
    text = (tmp_path / "pack" / MANIFEST_NAME).read_text()
    assert os.uname().nodename not in text
    assert str(tmp_path) not in text


def test_every_file_is_durable_before_its_name_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def seen_fsync(descriptor: int) -> None:
        events.append("fsync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def seen_rename(source: Path, target: Path) -> None:
        events.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "rename", seen_rename)
    commit(tmp_path / "pack")
    moment = events.index("rename")
    for name in ("numbers.bin", "note.json", MANIFEST_NAME):
        assert f"fsync {name}" in events[:moment]
    assert events[moment - 1].startswith(f"fsync {TEMPORARY_PREFIX}pack"), (
        "the folder's own names, last before the rename"
    )
    assert events[moment + 1] == f"fsync {tmp_path.name}"


@pytest.mark.parametrize("name", ["numbers.bin", "note.json", MANIFEST_NAME])
def test_every_flipped_bit_is_detected(tmp_path: Path, name: str) -> None:
    commit(tmp_path / "pack")
    path = tmp_path / "pack" / name
    clean = path.read_bytes()
    for place in range(0, len(clean), max(1, len(clean) // 40)):
        for bit in (0, 5, 7):
            path.write_bytes(clean[:place] + bytes([clean[place] ^ (1 << bit)]) + clean[place + 1 :])
            with pytest.raises(DamagedError) as error:
                verify_folder(tmp_path / "pack")
            assert is_one_line(error, path)
    path.write_bytes(clean)
    verify_folder(tmp_path / "pack")


def test_truncated_missing_and_added_manifest_bytes_are_damage(tmp_path: Path) -> None:
    commit(tmp_path / "pack")
    path = tmp_path / "pack" / MANIFEST_NAME
    clean = path.read_bytes()
    for changed in (b"", clean[:-1], clean + b" ", clean.replace(b"\n", b"\r\n"), b"[" * 100_000):
        path.write_bytes(changed)
        with pytest.raises(DamagedError):
            verify_folder(tmp_path / "pack")


def test_a_missing_file_a_foreign_folder_and_another_kind_are_refused_in_one_line(tmp_path: Path) -> None:
    commit(tmp_path / "pack")
    with pytest.raises(InputError, match="holds a sample, not a model"):
        verify_folder(tmp_path / "pack", "model")
    (tmp_path / "pack" / "note.json").unlink()
    with pytest.raises(DamagedError, match="a file is missing"):
        verify_folder(tmp_path / "pack")
    (tmp_path / "foreign").mkdir()
    with pytest.raises(InputError, match=r"not a folder mfext committed.*MANIFEST") as error:
        verify_folder(tmp_path / "foreign")
    assert is_one_line(error, tmp_path / "foreign")
    with pytest.raises(InputError, match="no such folder"):
        verify_folder(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/b", "..", ".hidden", "", "a\0b", "é", "a" * 200])
def test_a_hostile_manifest_cannot_name_a_file_outside(tmp_path: Path, name: str) -> None:
    commit(tmp_path / "pack")
    (tmp_path / "outside").write_bytes(b"secret")
    reseal(tmp_path / "pack", files={name: {"size_bytes": 6, "sha256": "0" * 64}})
    with pytest.raises(DamagedError, match="unsafe file name"):
        verify_folder(tmp_path / "pack")


@pytest.mark.parametrize(
    "changes",
    [
        {"files": []},
        {"files": {"note.json": {"size_bytes": True, "sha256": "0" * 64}}},
        {"files": {"note.json": {"size_bytes": -1, "sha256": "0" * 64}}},
        {"files": {"note.json": {"size_bytes": 1, "sha256": "G" * 64}}},
        {"files": {"note.json": 3}},
        {"files": {MANIFEST_NAME: {"size_bytes": 1, "sha256": "0" * 64}}},
        {"kind": 3},
        {"metadata": None},
        {"format_version": 99},
        {"parent": []},
    ],
)
def test_a_malformed_manifest_is_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    commit(tmp_path / "pack")
    reseal(tmp_path / "pack", **changes)
    with pytest.raises(InputError):
        verify_folder(tmp_path / "pack")


def test_links_pipes_and_folders_in_place_of_files_are_refused(tmp_path: Path) -> None:
    commit(tmp_path / "pack")
    path = tmp_path / "pack" / "note.json"
    (tmp_path / "copy").write_bytes(path.read_bytes())
    for make in (lambda: path.symlink_to(tmp_path / "copy"), lambda: os.mkfifo(path), path.mkdir):
        path.rmdir() if path.is_dir() else path.unlink()
        make()
        with pytest.raises(DamagedError, match="not a plain file"):
            verify_folder(tmp_path / "pack")
    path.rmdir()
    manifest = tmp_path / "pack" / MANIFEST_NAME
    manifest.unlink()
    os.mkfifo(manifest)
    with pytest.raises(DamagedError, match="not a plain file"):
        verify_folder(tmp_path / "pack")


def test_an_existing_target_is_never_overwritten(tmp_path: Path) -> None:
    commit(tmp_path / "pack")
    with pytest.raises(InputError, match="already exists"):
        commit(tmp_path / "pack")
    (tmp_path / "empty").mkdir()
    commit(tmp_path / "empty")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="already exists"):
        commit(tmp_path / "file")
    with pytest.raises(InputError, match="a file stands where a folder should be"):
        commit(tmp_path / "file" / "below")


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        write_new_file(folder / "part", b"x")
        raise RuntimeError("our own bug")

    with pytest.raises(RuntimeError):
        commit_folder(tmp_path / "pack", write, kind="sample", metadata={})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO, errno.EMFILE])
@pytest.mark.parametrize("call", ["write", "fsync", "rename", "mkdir"])
def test_a_refusing_machine_is_one_line_and_leaves_what_was_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    commit(tmp_path / "first")

    def refuse(*arguments: object, **options: object) -> object:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(MachineError) as error:
            commit(tmp_path / "second")
    assert is_one_line(error, tmp_path / "second", "intact")
    assert error.value.exit_code == 4
    assert os.listdir(tmp_path) == ["first"]
    verify_folder(tmp_path / "first")


def test_too_little_free_space_is_known_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result((*real[:4], 1, *real[5:])))
    with pytest.raises(MachineError, match=r"not enough free space \(1.0 MiB needed") as error:
        commit(tmp_path / "pack")
    assert is_one_line(error, tmp_path)


def test_a_file_size_limit_of_the_system_is_one_line(tmp_path: Path) -> None:
    program = (
        "import resource, sys; from pathlib import Path\n"
        "from mfext.store_folders import commit_folder; from mfext.store_files import write_new_file\n"
        "from mfext.errors import MachineError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "try: commit_folder(Path(sys.argv[1]), lambda f: write_new_file(f / 'x', b'x' * 9000), kind='k', metadata={})\n"
        "except MachineError as error: print(error); sys.exit(error.exit_code)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "pack")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 4, done.stderr
    assert "file size limit" in done.stdout
    assert os.listdir(tmp_path) == []


def test_temporary_names_of_the_dead_are_removed_and_of_the_living_kept(tmp_path: Path) -> None:
    dead_folder, dead_file = tmp_path / f"{TEMPORARY_PREFIX}a-1-x", tmp_path / f"{TEMPORARY_PREFIX}b-1-x"
    dead_folder.mkdir()
    (dead_folder / "half").write_bytes(b"x")
    dead_file.write_bytes(b"x")

    def write(folder: Path) -> None:
        write_two(folder)
        remove_stale(tmp_path)
        assert os.listdir(tmp_path) == [folder.name]

    commit_folder(tmp_path / "pack", write, kind="sample", metadata={})


def test_the_disk_primitives_import_no_torch() -> None:
    program = "import sys, mfext.store_folders, mfext.store_json; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], check=False).returncode == 0


def test_a_file_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.md"
    write_file_atomically(path, b"old")
    write_file_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    write = os.write

    def half(descriptor: int, data: memoryview) -> int:
        write(descriptor, data[:1])
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half)
        with pytest.raises(MachineError, match="no space left"):
            write_file_atomically(path, b"newest")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["report.md"]


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:3]))
    write_file_atomically(tmp_path / "x", b"0123456789")
    assert (tmp_path / "x").read_bytes() == b"0123456789"


def test_metadata_that_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written as JSON"):
        commit_folder(tmp_path / "pack", write_two, kind="sample", metadata={"loss": float("nan")})
    assert os.listdir(tmp_path) == []
