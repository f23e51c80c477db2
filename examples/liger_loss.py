"""Liger's chunked GRPO loss in a training step, plain and patched."""

import time

import liger_kernel.chunked_loss as liger
import torch

import r1kernels

B, S, D, V = 4, 128, 64, 32000
torch.manual_seed(0)
hidden, weight = torch.randn(B, S, D), torch.randn(V, D) / D**0.5
tokens, mask = torch.randint(0, V, (B, S)), torch.rand(B, S) > 0.3
advantages = torch.randn(B)


def step():
    loss_fn = liger.LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, compiled=False)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    old = torch.full((B, S), -10.4)
    began = time.perf_counter()
    loss, (clipped,) = loss_fn(h, w, tokens, mask, advantages, old_per_token_logps=old)
    loss.backward()
    return loss.item(), clipped.item(), w.grad, time.perf_counter() - began


step()
loss, clipped, grad, seconds = step()
with r1kernels.patch("liger"):
    step()
    our_loss, our_clipped, our_grad, our_seconds = step()
print(f"Liger:   loss {loss:.6f}, clipped {clipped:.4f}, {1e3 * seconds:.0f} ms")
print(f"patched: loss {our_loss:.6f}, clipped {our_clipped:.4f}, {1e3 * our_seconds:.0f} ms")
print(f"largest difference of dweight: {(our_grad - grad).abs().max() / grad.abs().max():.1e}")
