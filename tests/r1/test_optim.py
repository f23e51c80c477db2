"""Schedules by value, Muon by its defining property, resume bitwise."""

import copy

import pytest
import torch
from torch import nn

from r1.config import Optim
from r1.optim import UPDATE_RMS, Optimizer, lr_factor, orthogonalize


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.wide, self.tall = nn.Linear(8, 24), nn.Linear(24, 8)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 11, bias=False)

    def get_output_embeddings(self):
        return self.head

    def forward(self, tokens):
        x = self.embed(tokens)
        return self.head(self.norm(x + self.tall(torch.relu(self.wide(x)))))


def net(seed=0):
    torch.manual_seed(seed)
    return Net()


def train(module, optimizer, steps, first=0):
    losses = []
    for step in range(first, first + steps):
        tokens = torch.randint(11, (32,), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(module(tokens).float(), (tokens * 3 + 1) % 11)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"schedule": "constant"}, [1, 1, 1, 1]),
        ({"schedule": "constant", "warmup_steps": 2}, [0.5, 1, 1, 1]),
        ({"schedule": "linear"}, [0.75, 0.5, 0.25, 0]),
        ({"schedule": "linear", "final_lr": 0.2}, [0.8, 0.6, 0.4, 0.2]),
        ({"schedule": "linear", "decay_fraction": 0.5, "warmup_steps": 2}, [0.5, 1, 0.5, 0]),
        ({"schedule": "cosine", "decay_fraction": 0.5}, [1, 1, 0.5, 0]),
    ],
)
def test_schedule(options, expected):
    config = Optim(**options)
    assert [lr_factor(config, step, 4) for step in range(4)] == pytest.approx(expected)


@pytest.mark.parametrize("shape", [(6, 6), (5, 40)])
def test_orthogonalize_keeps_singular_vectors_and_levels_singular_values(shape):
    matrix = torch.randn(3, *shape)
    out = orthogonalize(matrix)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.mT @ out @ vh.mT
    diagonal = inner.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(inner, torch.diag_embed(diagonal), rtol=0, atol=2e-4)
    well_above_zero = s > 0.05 * s.norm(dim=-1, keepdim=True)
    assert diagonal[well_above_zero].min() > 0.6 and diagonal.max() < 1.3


def test_orthogonalize_leaves_zero_at_zero():
    assert orthogonalize(torch.zeros(1, 4, 6)).abs().max() == 0


def test_muon_moves_hidden_matrices_by_the_rms_of_adamw():
    module = net()
    before = copy.deepcopy(module.state_dict())
    train(module, Optimizer(module, Optim(name="muon", lr=0.01), 10), 1)
    for name in ("wide.weight", "tall.weight"):
        rms = (module.state_dict()[name] - before[name]).square().mean().sqrt()
        assert 0.6 < float(rms) / (0.01 * UPDATE_RMS) < 1.2


def test_embedding_head_and_vectors_go_to_adamw():
    module = net()
    optimizer = Optimizer(module, Optim(name="muon"), 10)
    assert set(optimizer.state_dict()["momentum"]) == {"wide.weight", "tall.weight"}
    plain = Optimizer(module, Optim(name="adamw"), 10)
    assert plain.state_dict()["momentum"] == {}


def test_adamw_is_torchs():
    ours, theirs = net(), net()
    config = Optim(name="adamw", lr=0.01, betas=(0.8, 0.9), weight_decay=0.1)
    decayed = [p for p in theirs.parameters() if p.ndim == 2]
    rest = [p for p in theirs.parameters() if p.ndim != 2]
    groups = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
    train(ours, Optimizer(ours, config, 10), 5)
    train(theirs, torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.9), weight_decay=0.1), 5)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_training_lowers_the_loss(name):
    module = net()
    losses = train(module, Optimizer(module, Optim(name=name, lr=0.02), 100), 100)
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_resume_is_bitwise(name, dtype, tmp_path):
    config = Optim(name=name, lr=0.01, schedule="cosine", warmup_steps=3, weight_decay=0.01)
    whole = net().to(dtype)
    train(whole, Optimizer(whole, config, 12), 12)
    first = net().to(dtype)
    optimizer = Optimizer(first, config, 12)
    train(first, optimizer, 5)
    torch.save([first.state_dict(), optimizer.state_dict()], tmp_path / "state")
    weights, state = torch.load(tmp_path / "state", weights_only=True)
    second = net(1).to(dtype)
    second.load_state_dict(weights)
    resumed = Optimizer(second, config, 12)
    resumed.load_state_dict(state)
    train(second, resumed, 7, first=5)
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_bfloat16_weights_do_not_lose_small_updates():
    module = net().to(torch.bfloat16)
    before = module.wide.weight.detach().clone()
    train(module, Optimizer(module, Optim(name="adamw", lr=1e-5), 300), 300)
    assert not torch.equal(before, module.wide.weight)


def test_micro_batches_add_up_in_float32():
    """In bfloat16 a sum stops growing once it is 256 times what is added to it."""
    module = net().to(torch.bfloat16)
    optimizer = Optimizer(module, Optim(name="adamw"), 1)
    for _ in range(1000):
        module.wide.weight.sum().backward()
    assert module.wide.weight.grad is None
    at = list(dict(module.named_parameters())).index("wide.weight")
    assert torch.equal(optimizer.masters[at].grad, torch.full((24, 8), 1000.0))
    optimizer.zero_grad()
    assert optimizer.masters[at].grad is None


def test_state_of_another_model_is_refused():
    state = Optimizer(net(), Optim(name="adamw"), 4).state_dict()
    with pytest.raises(ValueError, match="momentum does not fit"):
        Optimizer(net(), Optim(name="muon"), 4).load_state_dict(state)


def test_frozen_parameters_are_left_alone():
    module = net()
    module.wide.weight.requires_grad_(False)
    before = module.wide.weight.clone()
    optimizer = Optimizer(module, Optim(name="muon", lr=0.1), 3)
    train(module, optimizer, 3)
    assert torch.equal(before, module.wide.weight)
    assert set(optimizer.state_dict()["momentum"]) == {"tall.weight"}


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="no parameter"):
        Optimizer(net().requires_grad_(False), Optim(), 1)
