"""The compiled decoding step: the general path's numbers, and a silent step aside where it cannot be built."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mfext.config import ModelConfig
from mfext.model.generate import Sampling
from mfext.model.moduleformer import MOST_ROWS_COMPILED, ModuleFormer
from mfext_kernels import native
from mfext_kernels.decode_step import SOURCE, available, explain

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 2e-5  # float32: a few hundred roundings of sums of order one
SHAPES = {
    "two heads": ModelConfig(d_model=32, num_layers=2, num_heads=2, d_attention=24, d_feedforward=40, d_router=10),
    "odd widths, three chosen": ModelConfig(
        d_model=27,
        num_layers=3,
        num_heads=3,
        d_attention=15,
        d_feedforward=13,
        d_router=7,
        attention_experts_per_token=3,
        feedforward_experts_per_token=1,
    ),
    "keys and values are the input": ModelConfig(
        d_model=32, num_layers=2, num_heads=1, d_attention=32, d_feedforward=24
    ),
    "other counts of experts in every bank": ModelConfig(
        d_model=16,
        num_layers=3,
        num_heads=2,
        d_attention=16,
        d_feedforward=24,
        d_router=8,
        attention_experts=(2, 9, 4),
        feedforward_experts=(5, 2, 12),
    ),
    "feed-forward narrower than attention": ModelConfig(
        d_model=16, num_layers=1, num_heads=2, d_attention=48, d_feedforward=8
    ),
}


@pytest.fixture(autouse=True)
def _built() -> None:
    if not available():
        pytest.skip(f"no compiled decoding step here: {explain()}")


def model_of(config: ModelConfig) -> ModuleFormer:
    model = ModuleFormer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # fresh biases are zeros, which would hide their absence
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.mark.parametrize("shape", SHAPES)
def test_step_by_step_equals_the_whole_forward(shape: str) -> None:
    model, ids = model_of(SHAPES[shape]), torch.randint(0, 256, (1, 300))
    with torch.no_grad():
        whole = model(ids).logits
        cache = model.new_cache(1, 300)
        steps = torch.cat([model(ids[:, [at]], cache=cache).logits for at in range(300)], dim=1)
    assert cache.compiled is not None and cache.length == 300
    scale = whole.abs().max()
    assert (steps - whole).abs().max() <= TOLERANCE * scale


def test_a_one_per_cent_wrong_kernel_would_be_noticed() -> None:
    model, ids = model_of(SHAPES["two heads"]), torch.randint(0, 256, (1, 40))
    with torch.no_grad():
        whole = model(ids).logits
        cache = model.new_cache(1, 40)
        model(ids[:, :39], cache=cache)
        cache.keys_values[0][1].mul_(1.01)
        step = model(ids[:, 39:], cache=cache).logits
    assert (step - whole[:, 39:]).abs().max() > TOLERANCE * whole.abs().max()


def test_steps_and_longer_pieces_take_turns_on_one_cache() -> None:
    model, ids = model_of(SHAPES["two heads"]), torch.randint(0, 256, (1, 24))
    with torch.no_grad():
        cache = model.new_cache(1, 24)
        pieces = torch.cat([model(piece, cache=cache).logits for piece in ids.split([5, 1, 1, 7, 1, 9], dim=1)], dim=1)
        whole = model(ids).logits
    assert (pieces - whole).abs().max() <= TOLERANCE * whole.abs().max()


def test_a_weight_changed_in_place_is_seen() -> None:
    model, ids = model_of(SHAPES["two heads"]), torch.randint(0, 256, (1, 4))
    with torch.no_grad():
        cache = model.new_cache(1, 4)
        model(ids[:, :1], cache=cache)
        model.blocks[0].feedforward.experts.down.zero_()
        cache.length = 0
        steps = torch.cat([model(ids[:, [at]], cache=cache).logits for at in range(4)], dim=1)
        whole = model(ids).logits
    assert (steps - whole).abs().max() <= TOLERANCE * whole.abs().max()


def test_a_parameter_given_other_data_leaves_the_old_storage_alive() -> None:
    model, ids = model_of(SHAPES["two heads"]), torch.randint(0, 256, (1, 1))
    with torch.no_grad():
        cache = model.new_cache(1, 4)
        before = model(ids, cache=cache).logits
        for block in model.blocks:
            block.feedforward.experts.up.data = torch.full_like(block.feedforward.experts.up, 7.0)
        cache.length = 0
        assert torch.equal(model(ids, cache=cache).logits, before)


def test_greedy_continuations_are_those_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = model_of(SHAPES["two heads"]), torch.randint(0, 256, (1, 9))
    with_it = model.generate(ids, sampling=Sampling(max_new_tokens=40)).rows[0].tokens
    monkeypatch.setattr("mfext.model.compiled_step.available", lambda: False)
    assert model.generate(ids, sampling=Sampling(max_new_tokens=40)).rows[0].tokens == with_it


def test_logits_have_the_same_bits_on_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(replace(SHAPES["two heads"], vocab_size=1003))  # parts of four tokens, the last one of three
    ids = torch.randint(0, 1003, (3, 4))
    monkeypatch.setattr("mfext_kernels.decode_step.HEAD_PART", 4000)
    threads, by_threads = torch.get_num_threads(), []
    try:
        for each in (1, 2, 5):
            torch.set_num_threads(each)
            cache = model.new_cache(3, 5)
            with torch.no_grad():
                by_threads.append(torch.cat([model(ids[:, [at]], cache=cache).logits for at in range(4)], dim=1))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(each, by_threads[0]) for each in by_threads)
    with torch.no_grad():
        whole = model(ids).logits
    assert (by_threads[0] - whole).abs().max() <= TOLERANCE * whole.abs().max()


@pytest.mark.parametrize("token", [-1, 258])
def test_an_id_outside_the_vocabulary_is_refused(token: int) -> None:
    model = model_of(SHAPES["two heads"])
    with torch.no_grad(), pytest.raises(IndexError, match="from 0 to 257"):
        model(torch.tensor([[token]]), cache=model.new_cache(1, 2))


def test_other_dtypes_take_the_torch_path() -> None:
    model, ids = model_of(SHAPES["two heads"]).double(), torch.randint(0, 256, (1, 1))
    cache = model.new_cache(1, 2)
    with torch.no_grad():
        model(ids, cache=cache)
    assert cache.compiled is None and cache.weights is not None


def test_not_a_number_stays_one_and_inside_the_weights() -> None:
    model, ids = model_of(SHAPES["two heads"]), torch.randint(0, 256, (1, 1))
    with torch.no_grad():
        model.embedding.weight.fill_(float("nan"))
        assert model(ids, cache=model.new_cache(1, 2)).logits.isnan().all()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"MFEXT_NATIVE": "0"}, "switched off"), ({"CC": "false", "PATH": "/usr/bin:/bin"}, "could not build")],
)
def test_it_steps_aside_where_it_cannot_be_built(changes: dict[str, str], reason: str, tmp_path: Path) -> None:
    code = "from mfext_kernels.decode_step import available, explain; print(available(), explain())"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "kernels"), "MFEXT_CACHE": str(tmp_path)} | changes
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("False") and reason in done.stdout


def test_builds_at_the_same_time_leave_one_whole_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MFEXT_CACHE", str(tmp_path))
    with ThreadPoolExecutor(3) as pool:
        built = list(pool.map(lambda _: native.build.__wrapped__(SOURCE.path), range(3)))
    assert all(each.loaded is not None for each in built)
    assert [path.suffix for path in (tmp_path / "kernels").iterdir()] == [".so"]


def test_a_header_changed_is_another_library(tmp_path: Path) -> None:
    source, header = tmp_path / "op.c", tmp_path / "shared.h"
    source.write_text('#include "shared.h"\n')
    header.write_text("int one(void);\n")
    before = native._identity(source, "cc")
    header.write_text("int two(void);\n")
    assert native._identity(source, "cc") != before


def test_a_folder_others_can_write_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels").chmod(0o777)
    monkeypatch.setenv("MFEXT_CACHE", str(tmp_path))
    built = native.build.__wrapped__(SOURCE.path)
    assert built.loaded is None and "written by others" in built.reason


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_side_by_side_equal_the_whole_forward_also_where_one_is_padded(shape: str) -> None:
    model, ids, mask = model_of(SHAPES[shape]), torch.randint(0, 256, (3, 40)), torch.ones(3, 40, dtype=torch.long)
    mask[1, :7] = 0
    with torch.no_grad():
        whole = model(ids, attention_mask=mask).logits
        cache = model.new_cache(3, 40)
        pieces = [model(ids[:, :9], attention_mask=mask[:, :9], cache=cache).logits]
        pieces += [model(ids[:, [at]], cache=cache).logits for at in range(9, 40)]
    assert cache.compiled is not None and cache.length == 40
    steps, real = torch.cat(pieces, dim=1), mask.bool()
    assert (steps - whole)[real].abs().max() <= TOLERANCE * whole[real].abs().max()


def test_a_document_that_begins_in_one_row_sees_nothing_older() -> None:
    model, ids = model_of(SHAPES["two heads"]), torch.randint(0, 256, (2, 12))
    starts = torch.zeros(2, 12, dtype=torch.long)
    starts[0, 5:] = 5
    with torch.no_grad():
        whole = model(ids, document_starts=starts).logits
        cache = model.new_cache(2, 12)
        steps = [model(ids[:, [at]], document_starts=starts[:, [at]], cache=cache).logits for at in range(12)]
    assert cache.compiled is not None
    assert (torch.cat(steps, dim=1) - whole).abs().max() <= TOLERANCE * whole.abs().max()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_has_the_same_bits_whoever_is_beside_it(shape: str) -> None:
    model, ids = model_of(SHAPES[shape]), torch.randint(0, 256, (11, 20))
    with torch.no_grad():

        def decoded(rows: torch.Tensor) -> torch.Tensor:
            cache = model.new_cache(len(rows), 20)
            for at in range(20):
                model(rows[:, [at]], cache=cache)
            assert cache.compiled is not None
            return torch.stack(cache.keys_values)  # the last layer's keys follow from all that lies below

        together = decoded(ids)
        alone = [decoded(ids[[row]]) for row in range(11)]
    assert torch.equal(together, torch.cat(alone, dim=2))


def test_more_rows_than_a_few_go_through_torch_together() -> None:
    model, ids = model_of(SHAPES["two heads"]), torch.randint(0, 256, (MOST_ROWS_COMPILED + 1, 1))
    cache = model.new_cache(len(ids), 2)
    with torch.no_grad():
        model(ids, cache=cache)
    assert cache.compiled is None and cache.weights is None
