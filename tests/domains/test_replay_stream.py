from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from mfext.domains.packing import pack
from mfext.domains.replay_stream import ReplayStream
from mfext.domains.stream import TokenStream
from mfext.domains.tokenizer import ByteTokenizer
from mfext.errors import InputError

LENGTH, BATCH = 8, 8
NEW, OLD = ord("n"), ord("o")


@pytest.fixture
def streams(tmp_path: Path) -> tuple[TokenStream, TokenStream]:
    def made(letter: str, count: int) -> TokenStream:
        parts = [pack((letter * count,), ByteTokenizer(), tmp_path)]
        return TokenStream(parts, sequence_length=LENGTH, batch_size=BATCH, seed=1, stage=2)

    return made("n", 400), made("o", 60)


def replayed(batch: dict[str, torch.Tensor]) -> list[bool]:
    """Which rows are of the buffer; a row never mixes both."""
    targets = batch["targets"]
    old = (targets == OLD).all(1)
    assert bool((old | (targets == NEW).all(1)).all())
    return [bool(each) for each in old]


@pytest.mark.parametrize("rate", [0.125, 0.1, 0.3, 0.5, 0.9])
def test_the_rate_is_exact_over_any_long_run(streams: tuple[TokenStream, TokenStream], rate: float) -> None:
    mixed = ReplayStream(*streams, rate)
    rows = [old for step in range(50) for old in replayed(mixed.batch(step))]
    for end in range(1, len(rows) + 1):
        assert sum(rows[:end]) == round(end * rate * 1000) // 1000
    assert sum(rows) == round(rate * len(rows))


def test_a_batch_is_a_pure_function_of_its_step(streams: tuple[TokenStream, TokenStream]) -> None:
    mixed = ReplayStream(*streams, 0.3)
    later = {key: value.clone() for key, value in mixed.batch(7).items()}
    for step in range(5):
        mixed.batch(step)
    again = pickle.loads(pickle.dumps(mixed)).batch(7)
    assert all(torch.equal(later[key], again[key]) for key in later)


def test_processes_and_micro_batches_share_out_the_rows_of_one_batch(streams: tuple[TokenStream, TokenStream]) -> None:
    mixed = ReplayStream(*streams, 0.3)
    whole = mixed.batch(3)
    parts = [mixed.batch(3, rank=rank, world=2, micro=micro, accumulation=2) for micro in (0, 1) for rank in (0, 1)]
    for key, value in whole.items():
        assert torch.equal(value, torch.cat([part[key] for part in parts]))


def test_new_windows_come_in_the_order_they_have_without_replay(streams: tuple[TokenStream, TokenStream]) -> None:
    mixed, new = ReplayStream(*streams, 0.25), streams[0]
    batches = [mixed.batch(step) for step in range(4)]
    starts = torch.cat([each["document_starts"][[not old for old in replayed(each)]] for each in batches])
    plain = torch.cat([new.batch(step)["document_starts"] for step in range(4)])
    assert torch.equal(starts, plain[: len(starts)])


def test_a_dataset_gives_the_batches_in_order(streams: tuple[TokenStream, TokenStream]) -> None:
    mixed = ReplayStream(*streams, 0.3)
    data = mixed.dataset(2, 5)
    assert len(data) == 3
    assert torch.equal(data[1]["input_ids"], mixed.batch(3)["input_ids"])


def test_a_rate_outside_0_to_1_is_refused(streams: tuple[TokenStream, TokenStream]) -> None:
    for rate in (0.0, 1.0):
        with pytest.raises(InputError, match="rate"):
            ReplayStream(*streams, rate)
