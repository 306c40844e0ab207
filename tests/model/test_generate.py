from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mfext.config import ModelConfig
from mfext.model.cache import Cache
from mfext.model.generate import PREFILL, Sampling, candidates, choose, generate, pad_left, sample_documents, uniform
from mfext.model.moduleformer import ModuleFormer

SMALL = ModelConfig(
    vocab_size=23, d_model=16, num_layers=2, num_heads=2, d_attention=12, attention_experts=3, feedforward_experts=4,
    d_feedforward=10, d_router=6, bos_id=20, eos_id=20, pad_id=21,
)  # fmt: skip


@pytest.fixture
def model() -> ModuleFormer:
    """A random model with logits spread enough that no two come near a tie."""
    torch.manual_seed(0)
    model = ModuleFormer(SMALL).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


class Scripted:
    """A model whose next token is a table's answer to the last one; it counts what it is fed."""

    def __init__(self, follows: dict[int, int], config: ModelConfig = SMALL) -> None:
        self.config, self.follows = config, follows
        self.device = torch.device("cpu")
        self.fed: list[list[int]] = []
        self.logits = torch.empty(0)

    def new_cache(self, batch_size: int, capacity: int) -> Cache:
        return Cache([torch.empty(2, batch_size, 1, capacity, 1)])

    def __call__(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        document_starts: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Scripted:
        self.fed.append(input_ids[:, -1].tolist())
        self.logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
        for row, tokens in enumerate(input_ids.tolist()):
            self.logits[row, -1, self.follows.get(tokens[-1], 0)] = 5.0
        return self


def letters(tokens: list[int]) -> str:
    return "".join("abcdefghijklmnopqrstuvwxyz"[token] for token in tokens)


def uncached_greedy(model: ModuleFormer, prompt: list[int], count: int) -> tuple[int, ...]:
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return tuple(ids[0, len(prompt) :].tolist())


def test_prompts_of_different_lengths_decode_as_they_would_alone(model: ModuleFormer) -> None:
    prompts = [[20, 1, 2, 3, 4, 5, 6], [20], [20, 9, 8]]
    ids, mask = pad_left(prompts, SMALL.pad_id)
    rows = model.generate(ids, mask, Sampling(max_new_tokens=15, stop_at_eos=False)).rows
    assert [row.tokens for row in rows] == [uncached_greedy(model, prompt, 15) for prompt in prompts]


def test_padding_at_the_right_gives_what_padding_at_the_left_gives(model: ModuleFormer) -> None:
    left, left_mask = pad_left([[20, 1, 2, 3], [20, 7]], SMALL.pad_id)
    right = torch.tensor([[20, 1, 2, 3], [20, 7, 21, 21]])
    right_mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    sampling = Sampling(max_new_tokens=9)
    assert generate(model, right, right_mask, sampling) == generate(model, left, left_mask, sampling)


def test_a_prompt_longer_than_a_piece_decodes_as_it_would_whole(model: ModuleFormer) -> None:
    long = torch.randint(0, 20, (PREFILL + 30,), generator=torch.Generator().manual_seed(1)).tolist()
    ids, mask = pad_left([long, [20, 3]], SMALL.pad_id)
    rows = generate(model, ids, mask, Sampling(max_new_tokens=5, stop_at_eos=False)).rows
    assert [row.tokens for row in rows] == [uncached_greedy(model, long, 5), uncached_greedy(model, [20, 3], 5)]


def test_a_row_ends_at_eos_and_the_others_go_on() -> None:
    model = Scripted({1: 2, 2: 20, 5: 6, 6: 7, 7: 8, 8: 9})
    rows = generate(model, torch.tensor([[1], [5]]), None, Sampling(max_new_tokens=4), decode=letters).rows
    assert (rows[0].tokens, rows[0].finish, rows[0].text) == ((2, 20), "eos", "c")
    assert (rows[1].tokens, rows[1].finish, rows[1].text) == ((6, 7, 8, 9), "length", "ghij")
    assert model.fed == [[1, 5], [2, 6], [SMALL.pad_id, 7], [SMALL.pad_id, 8]]


def test_decoding_stops_once_every_row_has_ended() -> None:
    model = Scripted({1: 20})
    generate(model, torch.tensor([[1], [1]]), None, Sampling(max_new_tokens=50))
    assert len(model.fed) == 1


def test_a_stop_sequence_of_tokens_ends_a_row() -> None:
    model = Scripted({1: 2, 2: 3, 3: 4, 4: 5})
    rows = generate(model, torch.tensor([[1]]), None, Sampling(stop=((2, 4), (3, 4)))).rows
    assert (rows[0].tokens, rows[0].finish, rows[0].text) == ((2, 3, 4), "stop", None)


def test_a_stop_string_is_cut_from_the_text_and_not_from_the_tokens() -> None:
    model = Scripted({1: 2, 2: 3, 3: 4, 4: 5})
    rows = generate(model, torch.tensor([[1]]), None, Sampling(stop_strings=("xy", "de")), decode=letters).rows
    assert (rows[0].tokens, rows[0].finish, rows[0].text) == ((2, 3, 4), "stop", "c")


def test_a_stop_string_inside_a_longer_token_is_found() -> None:
    model = Scripted({1: 2, 2: 3})

    def decode(tokens: list[int]) -> str:
        return "".join({2: "hello ", 3: "wor\n\nld"}.get(token, "?") for token in tokens)

    rows = generate(model, torch.tensor([[1]]), None, Sampling(stop_strings=("\n\n",)), decode=decode).rows
    assert (rows[0].text, rows[0].finish) == ("hello wor", "stop")


def test_sampling_repeats_with_a_seed_and_a_row_does_not_depend_on_its_neighbours(model: ModuleFormer) -> None:
    ids = torch.tensor([[20, 1], [20, 1], [20, 2]])
    sampling = Sampling(max_new_tokens=12, temperature=1.0, top_k=15, top_p=0.95, seed=3, stop_at_eos=False)
    rows = generate(model, ids, None, sampling).rows
    assert rows == generate(model, ids, None, sampling).rows
    assert rows[:2] == generate(model, ids[:2], None, sampling).rows
    assert rows[0].tokens != rows[1].tokens
    assert rows != generate(model, ids, None, replace(sampling, seed=4)).rows


def test_tokens_are_drawn_as_often_as_their_probabilities_say() -> None:
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0, -30.0])
    draws = 20_000
    drawn = choose(logits.expand(draws, 5), Sampling(temperature=0.7), uniform(draws, 1, seed=0)[:, 0])
    share = torch.bincount(drawn, minlength=5) / draws
    probability = (logits.double() / 0.7).softmax(0)
    error = (probability * (1 - probability) / draws).sqrt()
    assert ((share - probability).abs() <= 5 * error + 1e-9).all()


def test_top_k_keeps_exactly_k_and_top_p_the_smallest_set_that_reaches_it() -> None:
    probs = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    logits = probs.log()
    kept, tokens = candidates(logits, Sampling(temperature=1.0, top_k=2))
    assert tokens.tolist() == [[1, 3]]
    torch.testing.assert_close(kept, torch.tensor([[4 / 7, 3 / 7]]).double(), rtol=0, atol=1e-6)
    for top_p, expected in ((0.05, {1}), (0.39, {1}), (0.45, {1, 3}), (0.75, {1, 3, 2}), (0.95, {0, 1, 2, 3})):
        kept, tokens = candidates(logits, Sampling(temperature=1.0, top_p=top_p))
        assert set(tokens[kept > 0].tolist()) == expected


@pytest.mark.parametrize("temperature", [1e-300, 1e-8, 1.0, 1e300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_no_temperature_and_no_logit_overflows(temperature: float, dtype: torch.dtype) -> None:
    logits = torch.tensor([[3e38, -3e38, -math.inf, 0.0]]).to(dtype)
    for top_p in (1.0, 1e-12):
        sampling = Sampling(temperature=temperature, top_p=top_p)
        probs, _ = candidates(logits, sampling)
        assert torch.isfinite(probs).all()
        assert probs.sum() > 0
        for chance in (0.0, 0.5, 1 - 2**-53):
            assert choose(logits, sampling, torch.tensor([chance], dtype=torch.float64)).item() != 2


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    for chance in (0.0, 0.25, 0.5, 0.75, 1 - 2**-53):
        for sampling in (Sampling(temperature=1.0), Sampling(temperature=1.0, top_k=5, top_p=0.9)):
            assert choose(logits, sampling, torch.tensor([chance], dtype=torch.float64)).item() in (1, 3)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_p", math.nan),
        ("stop", ((),)),
        ("stop_strings", ("",)),
        ("seed", -1),
    ],
)
def test_a_wrong_setting_is_refused_with_key_value_and_rule(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{key}=.*must be"):
        replace(Sampling(), **{key: value})


def test_prompts_that_cannot_be_continued_are_refused() -> None:
    model, ids = Scripted({}), torch.tensor([[1, 2, 3]])
    for mask in ([[1, 0, 1]], [[0, 0, 0]], [[1, 1]]):
        with pytest.raises(ValueError, match="attention_mask"):
            generate(model, ids, torch.tensor(mask), Sampling())
    with pytest.raises(ValueError, match="input_ids"):
        generate(model, ids[:, :0], None, Sampling())
    with pytest.raises(ValueError, match="stop_strings"):
        generate(model, ids, None, Sampling(stop_strings=("x",)))
    with pytest.raises(ValueError, match="prompts"):
        pad_left([[1], []], 0)


def test_sampled_documents_do_not_see_the_document_before(model: ModuleFormer) -> None:
    rows = sample_documents(model, num=4, length=48, seed=5, batch=3)
    assert rows.shape == (4, 48)
    assert rows.dtype == torch.long
    assert (rows[:, 0] == SMALL.bos_id).all()
    assert (rows != SMALL.pad_id).all()
    assert (rows[:, 1:] == SMALL.bos_id).any(), "the seed shows no document end"
    chance = uniform(4, 48, seed=5)
    for row, tokens in enumerate(rows.tolist()):
        for position in range(1, 48):
            begin = max(index for index in range(position) if tokens[index] == SMALL.bos_id)
            with torch.no_grad():
                logits = model(torch.tensor([tokens[begin:position]])).logits[:, -1]
            logits[:, SMALL.pad_id] = -math.inf
            assert choose(logits, Sampling(temperature=1.0), chance[row : row + 1, position]).item() == tokens[position]


def test_sampled_documents_do_not_depend_on_the_batch_and_train_without_complaint(model: ModuleFormer) -> None:
    rows = sample_documents(model, num=5, length=20, seed=1, batch=5)
    assert torch.equal(rows, sample_documents(model, num=5, length=20, seed=1, batch=2))
    assert not torch.equal(rows, sample_documents(model, num=5, length=20, seed=2, batch=5))
    model(rows).logits.sum().backward()


def test_no_documents_are_an_empty_sample(model: ModuleFormer) -> None:
    assert sample_documents(model, num=0, length=7, seed=0).shape == (0, 7)
    with pytest.raises(ValueError, match="length=0: must be"):
        sample_documents(model, num=1, length=0, seed=0)


@pytest.mark.parametrize("columns", [1, 3, 16, 65])
def test_random_numbers_of_a_row_are_the_same_for_any_number_of_rows(columns: int) -> None:
    many = uniform(40, columns, seed=9)
    assert all(torch.equal(uniform(rows, columns, seed=9), many[:rows]) for rows in (0, 1, 2, 7, 33))
    assert ((many >= 0) & (many < 1)).all()


def test_eos_becomes_the_bos_of_the_next_sampled_document() -> None:
    model = Scripted({20: 1, 1: 22, 22: 3}, replace(SMALL, eos_id=22))
    model.follows = {20: 22}
    rows = sample_documents(model, num=40, length=3, seed=0)
    assert (rows != 22).all()
    assert (rows[:, 1] == SMALL.bos_id).any()
