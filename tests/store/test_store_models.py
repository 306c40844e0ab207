"""Tensors and model folders: safetensors, finite, verified, replaced safely."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from mfext.errors import DamagedError, InputError, MachineError
from mfext.store import (
    load_model_folder,
    load_tensors,
    model_hash,
    read_json,
    save_model,
    save_tensors,
    tensor_hashes,
    verify_folder,
)
from mfext.store_folders import commit_folder

CONFIG: dict[str, object] = {"d_model": 16, "generations": []}


def tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "embedding.weight": torch.randn(7, 16, generator=generator),
        "half": torch.randn(3, generator=generator).bfloat16(),
        "scalar": torch.tensor(1.5, dtype=torch.float64),
        "rng": torch.arange(5, dtype=torch.uint8),
        "empty": torch.zeros(0, 4),
    }


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return tensor_hashes(found) == tensor_hashes(expected)


def test_a_model_reads_back_bit_for_bit_with_its_config_and_extras(tmp_path: Path) -> None:
    extra = {"gate": {"weight": torch.ones(2)}, "plan": {"added": 4}, "tokenizer.json": b'{"raw": true}'}
    manifest = save_model(tensors(), CONFIG, tmp_path / "model", {"stage": "base"}, extra)
    config, found, again = load_model_folder(tmp_path / "model")
    assert same(found, tensors())
    assert config == {"model_type": "mfext_moduleformer", "format_version": 1, **CONFIG}
    assert again == manifest
    names = {"MANIFEST.json", "config.json", "gate.safetensors", "model.safetensors", "plan.json", "tokenizer.json"}
    assert set(os.listdir(tmp_path / "model")) == names
    assert torch.equal(load_tensors(tmp_path / "model" / "gate.safetensors")["weight"], torch.ones(2))
    assert read_json(tmp_path / "model" / "plan.json") == {"added": 4}
    assert (tmp_path / "model" / "tokenizer.json").read_bytes() == b'{"raw": true}'
    assert (tmp_path / "model" / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~current_mask()


def current_mask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_non_finite_tensors_are_never_committed(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    bad = torch.zeros(50, dtype=dtype)
    bad[17] = value
    with pytest.raises(InputError, match=r"'blocks\.0\.up' holds NaN or infinity"):
        save_model({**tensors(), "blocks.0.up": bad}, CONFIG, tmp_path / "model", {})
    assert os.listdir(tmp_path) == []


def test_tensors_that_share_or_slice_storage_are_saved_as_what_they_are(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    views = {"whole": base, "same": base, "row": base[1], "transposed": base.t()}
    save_tensors(tmp_path / "x.safetensors", views)
    assert same(load_tensors(tmp_path / "x.safetensors"), views)


def test_loading_checks_the_hash_given_or_the_manifests(tmp_path: Path) -> None:
    save_model(tensors(), CONFIG, tmp_path / "model", {})
    path = tmp_path / "model" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    for load in (lambda: load_tensors(path), lambda: load_model_folder(tmp_path / "model")):
        with pytest.raises(DamagedError, match="SHA-256 does not match"):
            load()
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes(data)
    load_tensors(alone)
    with pytest.raises(DamagedError, match="SHA-256 does not match"):
        load_tensors(alone, sha256="0" * 64)
    (tmp_path / "model" / "added.safetensors").write_bytes(data)
    with pytest.raises(DamagedError, match="the manifest does not list"):
        load_tensors(tmp_path / "model" / "added.safetensors")


def test_strangers_files_are_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for content in (b"", b"\x80\x04pickle", b"\xff" * 64, (10**9).to_bytes(8, "little") + b"{}"):
        path.write_bytes(content)
        with pytest.raises(DamagedError, match="not a valid safetensors file") as error:
            load_tensors(path)
        assert "\n" not in str(error.value)
    safetensors.torch.save_file({"w": torch.tensor([1.0, float("nan")])}, path)
    with pytest.raises(DamagedError, match="'w' holds NaN"):
        load_tensors(path)
    with pytest.raises(InputError, match="no such file"):
        load_tensors(tmp_path / "nothing.safetensors")


def test_a_full_disk_under_the_tensor_writer_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(MachineError, match="no space left on the disk"):
        save_model(tensors(), CONFIG, tmp_path / "model", {})
    assert os.listdir(tmp_path) == []


def test_a_verified_model_is_replaced_and_nothing_else_is(tmp_path: Path) -> None:
    target = tmp_path / "model"
    save_model(tensors(1), CONFIG, target, {})
    save_model(tensors(2), CONFIG, target, {})
    assert same(load_model_folder(target).tensors, tensors(2))
    assert os.listdir(tmp_path) == ["model"]

    (target / "my-notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"also holds 'my-notes\.txt'"):
        save_model(tensors(3), CONFIG, target, {})
    (target / "my-notes.txt").unlink()
    (target / "config.json").write_text("{}")
    with pytest.raises(InputError, match="not a folder mfext may replace"):
        save_model(tensors(3), CONFIG, target, {})

    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(InputError, match="not a folder mfext may replace"):
        save_model(tensors(3), CONFIG, photos, {})
    assert os.listdir(photos) == ["cat.jpg"]
    commit_folder(tmp_path / "pack", lambda folder: (folder / "a").touch(), kind="pack", metadata={})
    with pytest.raises(InputError, match="holds a pack, not a model"):
        save_model(tensors(3), CONFIG, tmp_path / "pack", {})
    (tmp_path / "link").symlink_to(photos)
    with pytest.raises(InputError, match="not a folder mfext may replace"):
        save_model(tensors(3), CONFIG, tmp_path / "link", {})


def test_a_kill_between_the_two_renames_is_mended_by_loading_or_saving(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for act in (lambda: None, lambda: save_model(tensors(2), CONFIG, target, {})):
        save_model(tensors(1), CONFIG, target, {}) if not target.exists() else None
        os.rename(target, tmp_path / ".mfext-old-model")
        act()
        load_model_folder(target)
        assert os.listdir(tmp_path) == ["model"]


def test_a_failed_second_rename_puts_the_old_model_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, rename = tmp_path / "model", os.rename
    save_model(tensors(1), CONFIG, target, {})

    def refuse_new(source: Path, to: Path) -> None:
        if ".mfext-tmp-" in str(source) and Path(to) == target:
            raise OSError(5, "Input/output error")
        rename(source, to)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse_new)
        with pytest.raises(MachineError, match="input/output error"):
            save_model(tensors(2), CONFIG, target, {})
    assert same(load_model_folder(target).tensors, tensors(1))
    assert os.listdir(tmp_path) == ["model"]


def test_another_type_of_model_or_a_newer_one_is_refused(tmp_path: Path) -> None:
    for number, change in enumerate(({"model_type": "llama"}, {"format_version": 2})):
        target = tmp_path / str(number)
        save_model(tensors(), {**CONFIG, **change}, target, {})
        with pytest.raises(InputError, match="not a model this mfext reads"):
            load_model_folder(target)
    commit_folder(tmp_path / "pack", lambda folder: (folder / "a").touch(), kind="pack", metadata={})
    with pytest.raises(InputError, match="holds a pack, not a model"):
        load_model_folder(tmp_path / "pack")


def test_hashes_tell_bits_dtype_shape_and_name_apart_and_nothing_else() -> None:
    one = {"a": torch.zeros(4), "b": torch.ones(2)}
    assert model_hash(one) == model_hash({"b": torch.ones(2), "a": torch.zeros(8)[::2]})
    others = [
        {**one, "a": torch.tensor([0.0, -0.0, 0.0, 0.0])},
        {**one, "a": torch.zeros(2, 2)},
        {**one, "a": torch.zeros(4, dtype=torch.int32)},
        {"a": one["b"], "b": one["a"]},
    ]
    assert len({model_hash(other) for other in [one, *others]}) == 5


def test_the_parent_is_recorded(tmp_path: Path) -> None:
    parent = save_model(tensors(), CONFIG, tmp_path / "one", {})
    save_model(tensors(1), CONFIG, tmp_path / "two", {"parent": parent.identity})
    assert verify_folder(tmp_path / "two", "model").parent == parent.identity
