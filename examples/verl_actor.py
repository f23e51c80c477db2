"""A PPO step on verl's fused head. The loop and the head are stand-ins with verl's signature."""

import sys
import types
from time import perf_counter as now

import torch

import r1kernels


class FusedLinearForPPO(torch.nn.Module):
    def __init__(self, chunk_size=512):
        super().__init__()

    def forward(self, hidden_states, vocab_weights, input_ids, temperature=1.0):
        logps = ((hidden_states @ vocab_weights.T) / temperature).log_softmax(-1)
        return logps.gather(-1, input_ids[..., None]).squeeze(-1), -(logps.exp() * logps).sum(-1)


TITLE = "verl.utils.experimental.torch_functional"  # with verl: import it as verl
verl = sys.modules[TITLE] = types.ModuleType(TITLE)
verl.FusedLinearForPPO = FusedLinearForPPO
torch.manual_seed(0)
hidden, weight = torch.randn(1, 1024, 64), torch.randn(32000, 64, requires_grad=True)
tokens, advantages = torch.randint(0, 32000, (1, 1024)), torch.randn(1, 1024)


def step(name):
    for _ in range(2):  # the first call warms up
        weight.grad, began = None, now()
        logp, entropy = verl.FusedLinearForPPO()(hidden, weight, tokens, temperature=0.7)
        loss = -((logp - logp.detach()).exp() * advantages + 0.01 * entropy).mean()
        loss.backward()
    print(f"{name}: loss {loss:.6f}, |dweight| {weight.grad.norm():.6f}, {now() - began:.2f} s")


step("plain  ")
with r1kernels.patch("verl"):
    step("patched")
