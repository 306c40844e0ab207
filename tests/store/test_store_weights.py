"""Weights in fewer bits: how far they move, what they cost on disk, and that reading needs nothing but a product."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mfext.commands.models import open_model
from mfext.commands.models import save_model as save
from mfext.errors import DamagedError, InputError
from mfext.store import commit_folder, load_model_folder, narrow_weights, save_model, tensor_hashes, widen_weights
from mfext.store_tensors import tensors_size_bytes
from tests.growth.tiny_growth import tiny_model

CONFIG: dict[str, object] = {"d_model": 16}
HALF = 0.5 * (1 + 2.0**-16)
"""Half a step; the division by a float32 scale moves what lies on the border between two codes by no more."""


def tensors() -> dict[str, Tensor]:
    """A matrix and a stack whose channels differ a millionfold, a dead channel, a vector and a gate."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    matrix, stack = drawn(6, 40), drawn(3, 40, 5)
    matrix *= 10.0 ** torch.arange(-3, 3)[:, None]
    stack *= 10.0 ** torch.arange(-3, 2)
    stack[1, :, 2] = 0.0
    return {"matrix": matrix, "stack": stack, "vector": drawn(9), "gate": drawn(4, 4), "scalar": torch.tensor(1.5)}


def test_int8_moves_no_weight_by_more_than_half_a_step_of_its_own_channel() -> None:
    whole = tensors()
    stored = narrow_weights(whole, "int8", {"gate"})
    widened = widen_weights(stored, "here")
    assert widened.keys() == whole.keys()
    for name in ("matrix", "stack"):
        largest = whole[name].abs().amax(dim=1, keepdim=True)
        assert stored[name].dtype == torch.int8
        assert ((widened[name] - whole[name]).abs() <= HALF * largest / 127).all()
        assert stored[name].abs().amax(dim=1)[largest.squeeze(1) > 0].eq(127).all(), "every channel uses its range"
    assert widened["stack"][1, :, 2].eq(0.0).all()


def test_a_wrong_axis_or_a_scale_that_is_one_per_cent_off_would_show() -> None:
    whole, stored = tensors(), narrow_weights(tensors(), "int8", ())
    bound = HALF * whole["stack"].abs().amax(dim=1, keepdim=True) / 127
    for wrong in (stored["stack.scale"] * 1.01, stored["stack.scale"].mean(dim=2, keepdim=True).expand(3, 1, 5)):
        widened = widen_weights({**stored, "stack.scale": wrong}, "here")
        assert ((widened["stack"] - whole["stack"]).abs() > bound).any()


def test_bf16_keeps_eight_bits_of_every_weight() -> None:
    whole = tensors()
    stored = narrow_weights(whole, "bf16", {"gate"})
    widened = widen_weights(stored, "here")
    for name in ("matrix", "stack"):
        assert stored[name].dtype == torch.bfloat16 and widened[name].dtype == torch.float32
        assert ((widened[name] - whole[name]).abs() <= 2.0**-8 * whole[name].abs()).all()
        assert not torch.equal(widened[name], whole[name])


@pytest.mark.parametrize("weights", ["int8", "bf16"])
def test_vectors_and_what_is_named_keep_their_bits(weights: str) -> None:
    whole = tensors()
    widened = widen_weights(narrow_weights(whole, weights, {"gate"}), "here")
    for name in ("vector", "scalar", "gate"):
        assert torch.equal(widened[name], whole[name])


@pytest.mark.parametrize(("weights", "bits"), [("int8", 8), ("bf16", 16)])
def test_matrices_take_the_bits_promised(weights: str, bits: int) -> None:
    wide = {"up": torch.randn(4, 512, 64), "matrix": torch.randn(64, 512)}
    assert tensors_size_bytes(narrow_weights(wide, weights, ())) <= tensors_size_bytes(wide) * (bits + 0.1) / 32


@pytest.mark.parametrize("weights", ["int8", "bf16"])
def test_a_folder_is_read_back_to_the_same_float32_bits_without_torchao(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = narrow_weights(tensors(), weights, {"gate"})
    save_model(stored, {**CONFIG, "weights": weights}, tmp_path / "model", {})
    for name in ("torchao", "torchao.quantization"):
        monkeypatch.setitem(sys.modules, name, None)
    first, again = (load_model_folder(tmp_path / "model").tensors for _ in range(2))
    assert all(tensor.dtype == torch.float32 for tensor in first.values())
    assert tensor_hashes(first) == tensor_hashes(again) == tensor_hashes(widen_weights(stored, "here"))
    narrow_weights(tensors(), "bf16", ())
    with pytest.raises(InputError, match=r"torchao is not installed.*pip install 'mfext\[quantize\]'"):
        narrow_weights(tensors(), "int8", ())


def without_scales(stored: dict[str, Tensor]) -> None:
    del stored["stack.scale"]


def scales_of_another_shape(stored: dict[str, Tensor]) -> None:
    stored["stack.scale"] = stored["stack.scale"].squeeze(1)


def scales_of_another_type(stored: dict[str, Tensor]) -> None:
    stored["stack.scale"] = stored["stack.scale"].half()


@pytest.mark.parametrize("change", [without_scales, scales_of_another_shape, scales_of_another_type])
def test_codes_without_scales_that_fit_are_damage(change: Callable[[dict[str, Tensor]], None], tmp_path: Path) -> None:
    stored = narrow_weights(tensors(), "int8", ())
    change(stored)
    save_model(stored, {**CONFIG, "weights": "int8"}, tmp_path / "model", {})
    with pytest.raises(DamagedError, match="int8 tensor 'stack' has no scales that fit"):
        load_model_folder(tmp_path / "model")


def test_a_format_of_another_mfext_is_refused_in_one_line(tmp_path: Path) -> None:
    save_model(narrow_weights(tensors(), "int8", ()), {**CONFIG, "weights": "int4"}, tmp_path / "model", {})
    with pytest.raises(InputError, match=r"does not read \(int4\)") as error:
        load_model_folder(tmp_path / "model")
    assert "\n" not in str(error.value)


def test_a_config_that_lost_its_format_never_reads_codes_as_weights(tmp_path: Path) -> None:
    save(tiny_model(), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    stored = narrow_weights(load_file(tmp_path / "model" / "model.safetensors"), "int8", ())

    def write(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(config))
        save_file(stored, folder / "model.safetensors")

    commit_folder(tmp_path / "odd", write, kind="model", metadata={})
    with pytest.raises(DamagedError):
        open_model(tmp_path / "odd")
