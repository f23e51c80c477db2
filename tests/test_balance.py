"""The cost of sequences, micro-batches within a budget, and ranks of equal cost."""

import itertools
import json
import math
import random
from dataclasses import replace

import pytest

from r1kernels.balance import balance, imbalance, largest_tokens, pack_by_budget
from r1kernels.model_shape import NAMED, ModelShape, position_limit, shape_of

SIZES = {"hidden": 48, "layers": 3, "heads": 6, "kv_heads": 2, "head_dim": 16}
SMALL = ModelShape(**SIZES, intermediate=80, vocab=97)


def long_tail(count: int, seed: int) -> list[int]:
    """Completions of a reasoning model: log-normal, cut at 32k."""
    draw = random.Random(seed)
    return [min(32768, max(16, int(draw.lognormvariate(8.0, 1.0)))) for _ in range(count)]


@pytest.fixture(scope="module")
def models():
    """A small model of each type with every option on, and its configuration."""
    import torch
    import transformers as t

    sizes = {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "intermediate_size": 80,
        "vocab_size": 97,
        "head_dim": 16,
    }
    configs = [
        t.Qwen2Config(**sizes, tie_word_embeddings=True),
        t.Qwen2Config(**sizes, use_sliding_window=True, sliding_window=8, max_window_layers=2),
        t.Qwen3Config(**sizes, attention_bias=True),
        t.LlamaConfig(**sizes, attention_bias=True, mlp_bias=True),
        t.MistralConfig(**sizes, sliding_window=8),
    ]
    with torch.device("meta"):
        return [(t.AutoModelForCausalLM.from_config(config), config) for config in configs]


def test_parameters_are_those_of_the_model(models, tmp_path):
    for model, config in models:
        shape = ModelShape.from_config(config)
        assert shape.params == sum(x.numel() for x in model.parameters()), config.model_type
        layer = sum(x.numel() for x in model.model.layers[0].parameters())
        assert shape.layer_params == layer, config.model_type
        config.save_pretrained(tmp_path)
        assert shape_of(str(tmp_path)) == shape == shape_of(tmp_path / "config.json")
        assert shape_of(json.loads((tmp_path / "config.json").read_text())) == shape


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_a_scaled_rotary_embedding_reaches_further(key):
    """The factor is added to a configuration that keeps the old limit, or has a new one."""
    for limit, original, reach in ((32, 32, 128), (32, None, 128), (131, 16, 131)):
        scaling = {"factor": 4.0, "original_max_position_embeddings": original}
        config = _config(max_position_embeddings=limit, **{key: scaling})
        assert shape_of(config).max_positions == position_limit(config) == reach
    assert position_limit(_config(**{key: {"factor": 4.0}})) is None
    assert position_limit(_config(max_position_embeddings=7, **{key: {"rope_theta": 1.0}})) == 7


def test_known_models_have_their_published_size():
    sizes = {
        "qwen2.5-1.5b": 1_543_714_304,
        "qwen2.5-7b": 7_615_616_512,
        "llama-3.1-8b": 8_030_261_248,
        "qwen3-8b": 8_190_735_360,
    }
    assert {name: shape.params for name, shape in NAMED.items()} == sizes


@pytest.mark.parametrize("length", [0, 1, 7, 33])
@pytest.mark.parametrize(("window", "narrow"), [(None, 0), (8, 2)])
def test_cost_counts_what_each_token_sees(length, window, narrow):
    shape = replace(SMALL, window=window, window_layers=narrow)
    matrices = 3 * (2 * 48 * 96 + 2 * 48 * 32 + 3 * 48 * 80) + 48 * 97
    # A key that is only just seen counts half, as in the causal half of a square.
    pairs = 0
    for layer in range(3):
        reach = window if window and layer < narrow else length
        pairs += 2 * sum(min(at + 1, reach) for at in range(length)) - min(length, reach)
    assert shape.cost(length) == length * matrices + 96 * pairs
    assert shape.flops(length) == 6 * shape.cost(length)


def test_bins_keep_to_the_tokens_and_lose_nothing():
    lengths = long_tail(400, 0)
    bins = pack_by_budget(lengths, 40_000)
    assert sorted(itertools.chain(*bins)) == list(range(400))
    assert all(sum(lengths[index] for index in content) <= 40_000 for content in bins)
    assert all(content == sorted(content) for content in bins)
    assert len(bins) <= 1.1 * sum(lengths) / 40_000 + 1


def test_a_sequence_longer_than_the_budget_stands_alone():
    assert pack_by_budget([5, 50, 5], 10) == [[1], [0, 2]]
    assert pack_by_budget([], 10) == []


def test_bins_keep_to_the_predicted_bytes():
    def bytes_of(tokens):
        return 1000 + 7 * tokens

    lengths = long_tail(200, 1)
    limit = bytes_of(max(lengths) + 1000)
    bins = pack_by_budget(lengths, 10**9, max_bytes=limit, bytes_of=bytes_of)
    totals = [sum(lengths[index] for index in content) for content in bins]
    assert all(bytes_of(total) <= limit for total in totals)
    assert bins == pack_by_budget(lengths, max(lengths) + 1000)
    # The tighter of both budgets counts.
    assert pack_by_budget([4, 4, 4], 8, max_bytes=10**6, bytes_of=bytes_of) == [[0, 1], [2]]
    assert largest_tokens(bytes_of, limit) == max(lengths) + 1000
    assert largest_tokens(bytes_of, 1006) == 0


def test_bytes_that_nothing_limits_are_an_error():
    for bytes_of, limit in ((lambda tokens: 5, 5), (lambda tokens: tokens, 10**300)):
        with pytest.raises(ValueError, match="tokens still fit: give a smaller limit"):
            largest_tokens(bytes_of, limit)


@pytest.mark.parametrize("equal_size", [False, True])
@pytest.mark.parametrize("ranks", [2, 8, 16])
@pytest.mark.parametrize("name", ["qwen2.5-1.5b", "llama-3.1-8b"])
def test_ranks_differ_by_two_percent_at_most(name, ranks, equal_size):
    for seed in range(3):
        lengths = long_tail(512, seed)
        parts = balance(lengths, ranks, NAMED[name], equal_size=equal_size)
        assert sorted(itertools.chain(*parts)) == list(range(512))
        assert not equal_size or {len(part) for part in parts} == {512 // ranks}
        assert imbalance(parts, lengths, NAMED[name]) <= 0.02
        assert parts == balance(lengths, ranks, NAMED[name], equal_size=equal_size)


def test_few_sequences_are_divided_as_well_as_they_can_be():
    draw = random.Random(3)
    for _ in range(20):
        lengths = [draw.randrange(1, 400) for _ in range(7)]
        costs = [SMALL.cost(length) for length in lengths]
        best = min(
            max(
                sum(cost for cost, place in zip(costs, at, strict=True) if place == r)
                for r in (0, 1)
            )
            for at in itertools.product((0, 1), repeat=7)
        )
        parts = balance(lengths, 2, SMALL)
        assert max(sum(costs[i] for i in part) for part in parts) <= 1.1 * best


@pytest.mark.parametrize("equal_size", [False, True])
def test_any_number_of_sequences(equal_size):
    for count, ranks in itertools.product(range(8), (1, 3, 5)):
        lengths = [10 + 7 * index for index in range(count)]
        parts = balance(lengths, ranks, SMALL, equal_size=equal_size)
        assert len(parts) == ranks and sorted(itertools.chain(*parts)) == list(range(count))
        if equal_size:
            sizes = [len(part) for part in parts]
            assert max(sizes) - min(sizes) <= 1
    assert imbalance([[], []], [], SMALL) == 0
    assert math.isclose(imbalance([[0], []], [5], SMALL), 1.0)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_lengths_of_32_bits_do_not_wrap(kind):
    lengths = [100_000, 90_000, 3, 4, 80_000]
    library = pytest.importorskip(kind)
    narrow = library.asarray(lengths, dtype=library.int32)
    shape, bytes_of = NAMED["qwen2.5-7b"], lambda tokens: 10**6 * tokens
    parts = balance(lengths, 2, shape)
    assert balance(narrow, 2, shape) == parts
    assert imbalance(parts, narrow, shape) == imbalance(parts, lengths, shape)
    bins = pack_by_budget(narrow, 100_004, max_bytes=10**12, bytes_of=bytes_of)
    assert bins == pack_by_budget(lengths, 100_004)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: pack_by_budget([1], 0), ValueError, "max_tokens: expected a positive"),
        (lambda: pack_by_budget([3, -1], 9), ValueError, r"lengths\[1\]: expected 0 or more"),
        (lambda: pack_by_budget([3], 9, max_bytes=5), ValueError, "belong together"),
        (
            lambda: pack_by_budget([3, 2_000], 9, max_bytes=10**9, bytes_of=lambda n: n * 10**6),
            ValueError,
            r"lengths\[1\]: 2000 tokens are predicted to take 2.00 GB, more than .* 1.00 GB",
        ),
        (lambda: pack_by_budget([2.5], 9), TypeError, "'float' object cannot be interpreted"),
        (lambda: balance([1], 0, SMALL), ValueError, "ranks: expected a positive"),
        (lambda: balance([-4], 2, SMALL), ValueError, r"lengths\[0\]"),
        (lambda: shape_of("qwen9"), ValueError, "unknown model 'qwen9': .*qwen2.5-7b"),
        (lambda: shape_of({"model_type": "llama"}), ValueError, "lacks hidden_size, num_hidden"),
        (lambda: shape_of(3), TypeError, "got int"),
        (
            lambda: shape_of(_config(model_type="mamba")),
            ValueError,
            "model type 'mamba' is not known, only qwen2",
        ),
        (lambda: shape_of(_config(num_experts=8)), ValueError, "mixture of experts"),
        (lambda: shape_of(_config(num_key_value_heads=5)), ValueError, "5 kv_heads do not divide"),
        (lambda: shape_of(_config(hidden_size=-8)), ValueError, "hidden_size must be a positive"),
        (lambda: shape_of(_config(num_attention_heads=0)), ValueError, "attention_heads must be a"),
        (lambda: shape_of(_config(num_attention_heads="2")), ValueError, "integer, got '2'"),
    ],
)
def test_bad_input_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def _config(**changed) -> dict:
    sizes = {
        "model_type": "llama",
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 8,
    }
    return sizes | changed


def test_a_folder_without_a_configuration_and_one_that_is_broken(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json at"):
        shape_of(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        shape_of(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no JSON object"):
        shape_of(tmp_path)
