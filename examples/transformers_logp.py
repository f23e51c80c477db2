"""Log-probabilities of a causal LM's tokens, by its logits and without them."""

import resource
import time

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import r1kernels

torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 32000}
model = Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2))
ids = torch.randint(0, 32000, (2, 512))


def by_logits():
    logps = (model(ids).logits[:, :-1].float() / 0.7).log_softmax(-1)
    return logps.gather(-1, ids[:, 1:, None]).squeeze(-1)


def without_logits():
    return model(ids, return_logp=True, temperature=0.7).logp


def measure(name, fn):
    model.zero_grad()
    began = time.perf_counter()
    logp = fn()
    logp.mean().backward()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{name}: {time.perf_counter() - began:.2f} s, peak of the process {peak:.0f} MiB")
    return logp.detach(), model.lm_head.weight.grad.clone()


with r1kernels.patch("transformers") as places:
    logp, grad = measure("without logits", without_logits)
plain, plain_grad = measure("by logits     ", by_logits)
print(f"patched {len(places)} classes; largest difference of the log-probabilities", end=" ")
print(f"{(logp - plain).abs().max():.1e}, of dweight {(grad - plain_grad).abs().max():.1e}")
