import json

import pytest

from r1.data import PromptStream, read_jsonl
from r1.types import Completion, Group, Prompt, Sampling


class Numbers:
    def __init__(self, name, size):
        self.name, self.fingerprint, self._size = name, f"{name}:{size}", size

    def size(self, split):
        return self._size

    def prompts(self, split, n, start=0):
        return [Prompt(f"{self.name}{i}", "", "", self.name) for i in range(start, start + n)]


def ids(prompts):
    return [prompt.id for prompt in prompts]


def test_each_epoch_is_a_permutation_of_its_own():
    stream = PromptStream([Numbers("a", 50)], seed=0)
    first, second = ids(stream.take(50)), ids(stream.take(50))
    everything = [f"a{i}" for i in range(50)]
    assert sorted(first) == sorted(second) == sorted(everything)
    assert first != second and first != everything
    assert (stream.position, stream.epoch) == (100, 2.0)


def test_order_follows_the_seed():
    orders = [ids(PromptStream([Numbers("a", 50)], seed=seed).take(120)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("sizes", [(7,), (7, 30)])
@pytest.mark.parametrize("drawn", [0, 1, 7, 45])
def test_resumed_stream_goes_on_exactly(sizes, drawn):
    def stream():
        return PromptStream([Numbers(f"t{size}-", size) for size in sizes], seed=3)

    whole = stream()
    whole.take(drawn)
    state = json.loads(json.dumps(whole.state_dict()))
    resumed = stream()
    resumed.load_state_dict(state)
    assert ids(resumed.take(40)) == ids(whole.take(40))


def test_mixture_follows_the_weights():
    stream = PromptStream([Numbers("a", 10), Numbers("b", 1000)], seed=0, weights=[3, 1])
    drawn = ids(stream.take(2000))
    assert abs(sum(name.startswith("a") for name in drawn) - 1500) < 80
    assert len({name for name in drawn if name.startswith("a")}) == 10


def test_changed_data_is_refused():
    state = PromptStream([Numbers("a", 10)], seed=0).state_dict()
    for other in (
        PromptStream([Numbers("a", 11)], seed=0),
        PromptStream([Numbers("a", 10)], seed=1),
        PromptStream([Numbers("a", 10), Numbers("b", 10)], seed=0),
    ):
        with pytest.raises(ValueError, match="changed since the checkpoint"):
            other.load_state_dict(state)


@pytest.mark.parametrize("tasks, weights", [(0, None), (2, [1]), (2, [1, 0]), (1, [-1])])
def test_bad_mixtures(tasks, weights):
    with pytest.raises(ValueError, match="positive weights"):
        PromptStream([Numbers(str(i), 3) for i in range(tasks)], seed=0, weights=weights)


def test_jsonl_rows_come_with_their_line_numbers(tmp_path):
    rows = [{"a": "\ud800 \u6570\n"}, {"b": [1, None]}]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [(number, row) for number, row, _ in read_jsonl(path)] == list(enumerate(rows, 1))
    path.write_bytes(b'\n{"a": 1}\n3\n')
    assert [(number, fault is None) for number, _, fault in read_jsonl(path)] == [
        (2, True),
        (3, False),
    ]


def test_types_refuse_what_does_not_fit_together():
    prompt, completion = Prompt("p", "q", "a", "t"), Completion((1,), (0.0,), "stop", 0)
    with pytest.raises(ValueError, match="2 tokens and 1"):
        Completion((1, 2), (0.0,), "stop", 0)
    with pytest.raises(ValueError, match=r"'p'.*\(1, 2, 1\)"):
        Group(prompt, [completion], [1.0, 2.0], [{}])
    for wrong in ({"n": 0}, {"max_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}):
        with pytest.raises(ValueError, match="Sampling needs"):
            Sampling(**{"n": 1, "max_tokens": 1, **wrong})
