"""An actor's loss on OpenRLHF's log_probs_from_logits. Loop and function are stand-ins."""

import sys
import time
import types

import torch

import r1kernels


def log_probs_from_logits(logits, labels, temperature: float = 1.0):
    logps = (logits.float() / temperature).log_softmax(-1)
    return logps.gather(-1, labels[..., None]).squeeze(-1)


# With OpenRLHF: from openrlhf.models import utils
TITLE = "openrlhf.models.utils"
utils = sys.modules[TITLE] = types.ModuleType(TITLE)
utils.log_probs_from_logits = log_probs_from_logits
torch.manual_seed(0)
logits, tokens = torch.randn(2, 512, 32000), torch.randint(0, 32000, (2, 512))
logits.requires_grad_()
advantages = torch.randn(2, 1)


def step(name):
    for _ in range(2):  # the first call warms up
        logits.grad, began = None, time.perf_counter()
        logp = utils.log_probs_from_logits(logits, tokens, temperature=0.7)
        loss = -((logp - logp.detach()).exp() * advantages).mean()
        loss.backward()
    seconds, norm = time.perf_counter() - began, logits.grad.norm()
    print(f"{name}: mean logp {logp.mean():.6f}, |dlogits| {norm:.8f}, {seconds:.2f} s")


step("plain  ")
with r1kernels.patch("openrlhf"):
    step("patched")
