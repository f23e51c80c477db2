"""Signatures of libraries that do not install on a machine without a GPU, as they stand in public.

Bodies are plain eager torch of our own; SOURCES says where a signature was read. Two libraries have
a second form beside the one of MEMBERS: verl's release 0.9.1 (read from its wheel) in RELEASED, and
prime-rl since its sampling-mask replay (pull request 3431 there; read from a copy that names no
commit) as MaskedOutputLinear.
"""

import sys
import types
import typing

import torch
import torch.distributed as dist

SOURCES = {
    "verl.utils.kernel.linear_cross_entropy": (
        "verl-project/verl",
        "562cecf6225af75b383c42dcc26218cf03271a42",
    ),
    "verl.utils.experimental.torch_functional": (
        "verl-project/verl",
        "015bc5599de25dd397be96785e276b8cd5f0dc08",
    ),
    "verl.utils.torch_functional": (
        "verl-project/verl",
        "f6ea48d1900bcb86ca38dec38ae82b36b3468ec3",
    ),
    "openrlhf.models.utils": (
        "OpenRLHF/OpenRLHF",
        "473f61bd290a1718381e65338316a87b4f722b5a",
    ),
    "prime_rl.trainer.models.layers.lm_head": (
        "PrimeIntellect-ai/prime-rl",
        "049a80afebd85a76b61146d6116485c11147e362",
    ),
}


def eager(logits, labels, temperature=1.0):
    """(log-probabilities, entropy); float32 unless the logits are float64."""
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.view(*labels.shape, 1)
    x = (logits if logits.dtype == torch.float64 else logits.float()) / temperature
    logps = x.log_softmax(-1)
    logp = logps.gather(-1, labels[..., None]).squeeze(-1)
    return logp, -(logps.exp() * logps).sum(-1)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    reduction: typing.Optional[str] = "none",  # noqa: UP045
    dist_process_group: typing.Optional[dist.ProcessGroup] = None,  # noqa: UP045
) -> tuple[torch.Tensor, torch.Tensor]:
    logp, entropy = eager(hidden.flatten(0, -2) @ weight.T, labels.flatten(), temperature)
    return {"none": logp, "sum": logp.sum(), "mean": logp.mean()}[reduction], entropy


class FusedLinearForPPO(torch.nn.Module):
    def __init__(self, chunk_size: int = 512):
        super().__init__()

        self.chunk_size = chunk_size

    def forward(
        self,
        hidden_states: torch.FloatTensor,
        vocab_weights: torch.FloatTensor,
        input_ids: torch.LongTensor,
        temperature: float | torch.Tensor = 1.0,
    ) -> tuple[torch.FloatTensor, torch.FloatTensor]:
        logp, entropy = eager(hidden_states @ vocab_weights.T, input_ids.long(), temperature)
        return logp, entropy.to(hidden_states.dtype)


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        temperature: typing.Optional[float] = 1.0,  # noqa: UP045
        reduction: typing.Optional[str] = "none",  # noqa: UP045
        dist_process_group: typing.Optional[dist.ProcessGroup] = None,  # noqa: UP045
    ) -> list[torch.Tensor]:
        return linear_cross_entropy(hidden, weight, labels, temperature, reduction)


class ReleasedFusedLinearForPPO(FusedLinearForPPO):
    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch"):
        super().__init__(chunk_size)


def logprobs_from_logits(logits, labels, inplace_backward=True):
    return eager(logits, labels)[0]


def log_probs_from_logits(
    logits: torch.Tensor, labels: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    return eager(logits, labels, temperature)[0]


class FusedOutputLinear(torch.nn.Linear):
    def __init__(self, in_features: int, out_features: int, chunk_size: int):
        super().__init__(in_features, out_features, bias=False)
        self.chunk_size = chunk_size

    def forward(
        self,
        hidden_states: torch.Tensor,
        labels: torch.Tensor | None = None,
        temperature: torch.Tensor | None = None,
    ) -> dict:
        logp, entropy = eager(hidden_states @ self.weight.T, labels, temperature)
        return {"logprobs": logp, "entropy": entropy}


class MaskedOutputLinear(FusedOutputLinear):
    def forward(
        self,
        hidden_states: torch.Tensor,
        labels: torch.Tensor | None = None,
        temperature: torch.Tensor | None = None,
        sampling_mask: torch.Tensor | None = None,
    ) -> dict:
        x = hidden_states @ self.weight.T
        logp, entropy = eager(x, labels, temperature)
        x = (x if x.dtype == torch.float64 else x.float()) / temperature[..., None]
        ids = sampling_mask.long()
        among = x.gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, -torch.inf)
        kept = x.gather(-1, labels[..., None]).squeeze(-1) - among.logsumexp(-1)
        replayed = (ids == labels[..., None]).any(-1)
        return {"logprobs": torch.where(replayed, kept, logp), "entropy": entropy.detach()}


MEMBERS = {
    "verl.utils.kernel.linear_cross_entropy": linear_cross_entropy,
    "verl.utils.experimental.torch_functional": FusedLinearForPPO,
    "verl.utils.torch_functional": logprobs_from_logits,
    "openrlhf.models.utils": log_probs_from_logits,
    "prime_rl.trainer.models.layers.lm_head": FusedOutputLinear,
}

RELEASED = {
    "verl.utils.kernel.linear_cross_entropy": LinearCrossEntropy.apply,
    "verl.utils.experimental.torch_functional": ReleasedFusedLinearForPPO,
    "verl.utils.torch_functional": logprobs_from_logits,
}


def install(monkeypatch, library: str) -> dict[str, types.ModuleType]:
    """Modules of `library` that hold the stubs, imported as far as Python can tell."""
    modules = {}
    for title, member in MEMBERS.items():
        if title.split(".")[0] == library:
            module = types.ModuleType(title)
            setattr(module, member.__name__, member)
            monkeypatch.setitem(sys.modules, title, module)
            modules[title] = module
    return modules
