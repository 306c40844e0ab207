from __future__ import annotations

import pickle
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mfext.domains.packing import HEADER_BYTES, PackedDocuments, open_packed, pack
from mfext.domains.stream import TokenStream, shuffled
from mfext.domains.tokenizer import ByteTokenizer
from mfext.errors import InputError, MachineError

BOS = 256
SETTINGS = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXTS = st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=12)


class WideTokenizer(ByteTokenizer):
    vocab_size = 70_000
    fingerprint = "wide"


def stream(parts: list[PackedDocuments], length: int, batch: int = 1, seed: int = 1, stage: int = 0) -> TokenStream:
    return TokenStream(parts, sequence_length=length, batch_size=batch, seed=seed, stage=stage)


def epoch_of(tokens: TokenStream, epoch: int = 0) -> list[dict[str, torch.Tensor]]:
    first = epoch * tokens.windows_per_epoch
    return [tokens.batch(step) for step in range(first, first + tokens.windows_per_epoch)]


def test_documents_come_back_from_the_packed_file_and_the_file_is_reused(tmp_path: Path) -> None:
    documents = ("first", "zweites ä", "3")
    packed = pack(documents, ByteTokenizer(), tmp_path)
    (path,) = tmp_path.iterdir()
    changed = path.stat().st_mtime_ns
    again = pack(documents, ByteTokenizer(), tmp_path)
    assert path.stat().st_mtime_ns == changed
    for index, document in enumerate(documents):
        assert bytes(again.document(index)).decode() == document
        assert packed.tokens[packed.offsets[index]] == BOS
    assert (packed.num_documents, packed.num_tokens, packed.tokens.dtype) == (3, 19, np.uint16)


def test_other_documents_or_another_tokenizer_make_another_file(tmp_path: Path) -> None:
    pack(("a", "b"), ByteTokenizer(), tmp_path)
    pack(("ab",), ByteTokenizer(), tmp_path)
    wide = pack(("a", "b"), WideTokenizer(), tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    assert wide.tokens.dtype == np.uint32 and wide.offsets.tolist() == [0, 2, 4]


def test_every_flipped_byte_is_noticed_and_the_file_made_anew(tmp_path: Path) -> None:
    documents = ("some text", "more")
    packed = pack(documents, ByteTokenizer(), tmp_path)
    good = packed.path.read_bytes()
    header_end = good.index(b"\0")
    for place in [0, 9, *range(HEADER_BYTES, len(good))]:
        damaged = bytearray(good)
        damaged[place] ^= 1
        packed.path.write_bytes(damaged)
        with pytest.raises(InputError, match="damaged"):
            open_packed(packed.path)
    for size in (0, 7, header_end, HEADER_BYTES, len(good) - 1):
        packed.path.write_bytes(good[:size])
        with pytest.raises(InputError, match="damaged"):
            open_packed(packed.path)
    assert pack(documents, ByteTokenizer(), tmp_path).path.read_bytes() == good
    assert list(tmp_path.iterdir()) == [packed.path]


def test_nothing_to_pack_and_a_folder_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no documents to pack"):
        pack((), ByteTokenizer(), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="cannot write a cache file"):
        pack(("a",), ByteTokenizer(), tmp_path / "file")


def test_packed_documents_pickle_as_their_path(tmp_path: Path) -> None:
    packed = pack(("text " * 1000,), ByteTokenizer(), tmp_path)
    content = pickle.dumps(packed)
    assert len(content) < 500
    assert np.array_equal(pickle.loads(content).tokens, packed.tokens)


@SETTINGS
@given(TEXTS, st.integers(1, 9), st.integers(0, 3))
def test_every_token_of_an_epoch_appears_once_up_to_the_tail(tmp_path: Path, texts, length: int, epoch: int) -> None:
    packed = pack(tuple(texts), ByteTokenizer(), tmp_path)
    if packed.num_tokens <= length:
        return
    tokens = stream([packed], length)
    seen = [batch["input_ids"][0].tolist() for batch in epoch_of(tokens, epoch)]
    assert len(seen) == (packed.num_tokens - 1) // length and tokens.tokens_per_epoch == len(seen) * length
    left = Counter(packed.tokens.tolist())
    left.subtract(token for window in seen for token in window)
    assert min(left.values()) >= 0 and 1 <= sum(left.values()) <= length


@SETTINGS
@given(TEXTS, st.integers(1, 9), st.integers(0, 2))
def test_windows_are_cut_from_whole_documents_one_after_another(tmp_path: Path, texts, length: int, epoch: int) -> None:
    packed = pack(tuple(texts), ByteTokenizer(), tmp_path)
    if packed.num_tokens <= length:
        return
    order = shuffled(packed.num_documents, 1, 0, epoch, "documents", 0)
    line = [token for index in order for token in (BOS, *packed.document(int(index)))]
    last_bos = [max(place for place in range(at + 1) if line[place] == BOS) for at in range(len(line))]
    expected = []
    for begin in range(0, len(line) - length, length):
        starts = [max(last_bos[at] - begin, 0) for at in range(begin, begin + length)]
        expected.append((line[begin : begin + length], line[begin + 1 : begin + length + 1], starts))
    found = [
        tuple(batch[key][0].tolist() for key in ("input_ids", "targets", "document_starts"))
        for batch in epoch_of(stream([packed], length), epoch)
    ]
    assert sorted(found) == sorted(expected)


@SETTINGS
@given(st.integers(0, 40), st.integers(0, 5), st.integers(0, 3))
def test_order_is_a_function_of_seed_stage_and_step_alone(tmp_path: Path, step: int, seed: int, stage: int) -> None:
    packed = pack(tuple(f"document {number} of some" for number in range(30)), ByteTokenizer(), tmp_path)
    fresh = stream([packed], 7, 4, seed, stage).batch(step)
    used = stream([packed], 7, 4, seed, stage)
    for other in (step + 90, 0, step + 1):
        used.batch(other)
    assert all(torch.equal(fresh[key], used.batch(step)[key]) for key in fresh)
    for other in (stream([packed], 7, 4, seed + 1, stage), stream([packed], 7, 4, seed, stage + 1)):
        assert not torch.equal(fresh["input_ids"], other.batch(step)["input_ids"])


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 1), (1, 4), (2, 3), (3, 4)])
def test_processes_and_micro_batches_together_read_the_global_batch(
    tmp_path: Path, world: int, accumulation: int
) -> None:
    first = pack(tuple(f"document {number} of some" for number in range(30)), ByteTokenizer(), tmp_path)
    second = pack(("another text of its own",), ByteTokenizer(), tmp_path)
    tokens = stream([first, second], 5, 12)
    for step in (0, 11, 25):
        whole = tokens.batch(step)
        pieces = [
            tokens.batch(step, rank=rank, world=world, micro=micro, accumulation=accumulation)
            for micro in range(accumulation)
            for rank in range(world)
        ]
        for key, value in whole.items():
            assert torch.equal(torch.cat([piece[key] for piece in pieces]), value)
            assert value.dtype == torch.int64 and value.is_contiguous() and value.shape == (12, 5)


def test_a_batch_that_cannot_be_shared_evenly_is_refused(tmp_path: Path) -> None:
    tokens = stream([pack(("a text of some length",), ByteTokenizer(), tmp_path)], 4, 10)
    with pytest.raises(InputError, match=r"batch_size=10 cannot be shared evenly: 2 processes \* 3 micro-batches"):
        tokens.batch(0, world=2, accumulation=3)


def test_parts_mix_in_proportion_and_each_window_is_read_once_an_epoch(tmp_path: Path) -> None:
    large = pack(("a" * 900,), ByteTokenizer(), tmp_path)
    small = pack(("b" * 300,), ByteTokenizer(), tmp_path)
    tokens = stream([large, small], 10)
    assert tokens.windows_per_epoch == 90 + 30
    letters = [int(batch["input_ids"][0, -1]) for batch in epoch_of(tokens)]
    assert letters.count(ord("b")) == 30
    assert 5 <= letters[:60].count(ord("b")) <= 25


def test_a_batch_across_the_end_of_an_epoch_holds_both_epochs(tmp_path: Path) -> None:
    packed = pack(tuple(f"document {number} of some" for number in range(10)), ByteTokenizer(), tmp_path)
    single = stream([packed], 9, 1)
    windows = single.windows_per_epoch
    size = windows - 2
    batch = stream([packed], 9, size).batch(1)
    for row in range(size):
        assert torch.equal(batch["input_ids"][row], single.batch(size + row)["input_ids"][0])


def test_a_part_shorter_than_a_window_is_refused(tmp_path: Path) -> None:
    packed = pack(("short",), ByteTokenizer(), tmp_path)
    with pytest.raises(InputError, match="6 tokens is shorter than one window: sequence_length=6 needs 7"):
        stream([packed], 6)
    assert stream([packed], 5).windows_per_epoch == 1


def test_the_dataset_counts_micro_batches_from_the_step_it_resumes_at(tmp_path: Path) -> None:
    tokens = stream([pack(("a text of some length " * 9,), ByteTokenizer(), tmp_path)], 4, 8)
    dataset = tokens.dataset(3, 6, accumulation=2, rank=1, world=2)
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, shuffle=False)
    batches = list(loader)
    assert len(dataset) == len(batches) == 6
    for index, batch in enumerate(batches):
        same = tokens.batch(3 + index // 2, rank=1, world=2, micro=index % 2, accumulation=2)
        assert torch.equal(batch["input_ids"], same["input_ids"])
    with pytest.raises(IndexError):
        dataset[6]
    assert len(tokens.dataset(5, 5)) == 0


@SETTINGS
@given(st.integers(0, 300), st.integers(0, 10))
def test_shuffling_is_a_permutation_that_the_key_decides(count: int, key: int) -> None:
    order = shuffled(count, key)
    assert sorted(order.tolist()) == list(range(count))
    assert np.array_equal(order, shuffled(count, key))


def test_the_shuffle_is_the_same_on_every_machine_and_far_from_sorted() -> None:
    assert shuffled(8, 1, 2, "windows").tolist() == [2, 4, 1, 3, 5, 7, 6, 0]
    order = shuffled(10_000, "x")
    assert abs(np.corrcoef(np.arange(10_000), order)[0, 1]) < 0.05


def test_a_batch_is_drawn_in_well_under_a_training_step(tmp_path: Path) -> None:
    texts = tuple(f"{number} " * 400 for number in range(1500))
    tokens = stream([pack(texts, ByteTokenizer(), tmp_path)], 256, 16)
    tokens.batch(0)
    times = []
    for step in range(1, 60):
        begin = time.perf_counter()
        tokens.batch(step)
        times.append(time.perf_counter() - begin)
    assert min(times) < 2e-3
