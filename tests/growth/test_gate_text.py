"""What a domain gate learns from: batches of one domain a document, documents that change domain, and noise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mfext.config import GateTraining, ModelConfig
from mfext.growth.gate_text import REGIONS, GateBatch, GateText
from mfext.growth.probes import Windows, document_starts

CONFIG = ModelConfig(vocab_size=32, bos_id=29, eos_id=30, pad_id=31)
NEW, OLD, LENGTH = 3, 17, 40
PLAIN = GateTraining(batch_size=64, negatives_share=0.0, switching_share=0.0, noise=0.0)


def windows_of(token: int, count: int = 12) -> Windows:
    """Windows of one token after bos, so that a position's domain can be read off its token."""
    ids = torch.full((count, LENGTH), token)
    ids[:, 0] = CONFIG.bos_id
    return Windows(ids, document_starts(ids, CONFIG.bos_id))


def batch_of(settings: GateTraining, seed: int = 0) -> GateBatch:
    text = GateText.of(CONFIG, windows_of(NEW), windows_of(OLD))
    return text.batch(settings, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("switching_share", [0.0, 1.0])
def test_a_label_says_whether_its_token_is_new(switching_share: float) -> None:
    batch = batch_of(replace(PLAIN, switching_share=switching_share))
    ordinary = batch.input_ids != CONFIG.bos_id
    assert torch.equal(batch.labels_BT[ordinary], (batch.input_ids == NEW)[ordinary].float())
    assert 0.3 < float(batch.labels_BT.mean()) < 0.7


def test_documents_change_domain_where_asked_and_nothing_announces_it() -> None:
    whole, switching = batch_of(PLAIN), batch_of(replace(PLAIN, switching_share=1.0))
    assert not whole.labels_BT.diff(dim=1).any()
    changes = switching.labels_BT.diff(dim=1).abs().sum(1)
    assert bool((changes > 0).any()) and int(changes.max()) <= REGIONS - 1
    assert not (switching.input_ids[:, 1:] == CONFIG.bos_id).any()
    assert not switching.document_starts.any()


def test_the_share_of_batches_that_switch_is_what_was_asked() -> None:
    settings = replace(PLAIN, switching_share=0.3)
    text, generator = GateText.of(CONFIG, windows_of(NEW), windows_of(OLD)), torch.Generator().manual_seed(1)
    switching = sum(bool(text.batch(settings, generator).labels_BT.diff(dim=1).any()) for _ in range(200))
    assert 40 <= switching <= 80


def test_noise_replaces_tokens_but_never_makes_or_removes_a_special_one() -> None:
    clean, noisy = batch_of(PLAIN, 3), batch_of(replace(PLAIN, noise=0.5), 3)
    assert torch.equal(clean.document_starts, noisy.document_starts)
    assert torch.equal(clean.input_ids == CONFIG.bos_id, noisy.input_ids == CONFIG.bos_id)
    changed = float((clean.input_ids != noisy.input_ids).double().mean())
    assert 0.05 < changed < 0.2  # a quarter on average, half of which meets its like


def test_text_of_no_domain_takes_its_share() -> None:
    batch = batch_of(replace(PLAIN, negatives_share=0.25))
    nowhere = ((batch.input_ids != NEW) & (batch.input_ids != OLD) & (batch.input_ids != CONFIG.bos_id)).any(1)
    assert not batch.labels_BT[nowhere].any()
    assert int(batch.labels_BT.any(1).sum()) == 24
