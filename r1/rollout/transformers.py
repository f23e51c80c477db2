"""Sampling with the trainer's own model: exact, on any machine.

Every distinct prompt runs once, packed; its keys and values are then copied to the rows of its
samples, which advance together, one token a step. A row has one stream of uniform numbers from its
seed and draws by inverting the cumulative distribution, so it does not depend on the other rows.

Shapes: B rows, V vocabulary, M most tokens of a completion.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1.attention import DecodePlan, PackedPlan
from r1.model import CausalLM
from r1.rollout import check_request, completion, stop_tokens
from r1.types import Completion, Prompt, Sampling

# finished rows are dropped once this share of the rows is finished: dropping copies the cache
DROP_SHARE = 0.125


def draw(
    logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Draw one token per row and return (tokens_B int64, logp_B float32).

    The log-probability is that of the distribution drawn from: at the temperature, renormalized
    over the kept tokens when top_p < 1. Temperature 0 takes the largest logit; its logp is at 1.

    Args:
        logits_BV: float32.
        uniform_B: float64 in [0, 1).
    """
    logp_BV = torch.log_softmax(logits_BV / (temperature or 1.0), -1)
    if temperature == 0:
        tokens_B = logp_BV.argmax(-1)
        return tokens_B, logp_BV.gather(-1, tokens_B[:, None])[:, 0]
    p_BV = logp_BV.double().exp()
    if top_p < 1:
        sorted_BV, order_BV = p_BV.sort(-1, descending=True)
        # a token stays when less than top_p lies before it, so the first always does
        kept_BV = sorted_BV.masked_fill(sorted_BV.cumsum(-1) - sorted_BV >= top_p, 0)
        p_BV = torch.zeros_like(p_BV).scatter(-1, order_BV, kept_BV)
        logp_BV = logp_BV - p_BV.sum(-1, keepdim=True).log().float()
    cdf_BV = p_BV.cumsum(-1)
    # strictly below the total, so that a token without probability is never drawn
    level_B1 = (uniform_B.clamp_max(1 - 2.0**-40) * cdf_BV[:, -1])[:, None]
    tokens_B = torch.searchsorted(cdf_BV, level_B1, right=True)[:, 0]
    return tokens_B, logp_BV.gather(-1, tokens_B[:, None])[:, 0]


class TransformersEngine:
    """Samples from `lm` itself. While the trainer holds the same weights, `sync` copies nothing.

    Args:
        batch: most rows advanced together.
    """

    name = "transformers"

    def __init__(self, lm: CausalLM, *, batch: int = 256):
        self.lm = lm
        self.batch = batch
        self.version = 0

    def generate(
        self, prompts: list[Prompt], sampling: Sampling, seeds: list[list[int]]
    ) -> list[list[Completion]]:
        check_request(prompts, sampling, seeds, self.lm.max_length)
        stops = stop_tokens(self.lm, sampling)
        requests = [(p, seed) for p, row in enumerate(seeds) for seed in row]
        was_training = self.lm.module.training
        self.lm.module.eval()
        flat = []
        try:
            for start in range(0, len(requests), self.batch):
                chunk = requests[start : start + self.batch]
                sampled = self._sample(
                    [prompts[p] for p, _ in chunk], [s for _, s in chunk], sampling, stops
                )
                flat += [completion(self.lm, *pair, stops, self.version) for pair in sampled]
        finally:
            self.lm.module.train(was_training)
        return [flat[p * sampling.n : (p + 1) * sampling.n] for p in range(len(prompts))]

    # not inference_mode: some rotary embeddings keep what they compute, for training too
    @torch.no_grad()
    def _sample(self, prompts, seeds, sampling, stops) -> list[tuple[list[int], list[float]]]:
        lm, device = self.lm, self.lm.device
        distinct: dict[tuple[int, ...], int] = {}
        prompt_of_row = [distinct.setdefault(tuple(p.tokens), len(distinct)) for p in prompts]
        rows_B = torch.tensor(prompt_of_row, device=device)
        room = lm.max_length - min(len(tokens) for tokens in distinct)
        M = min(sampling.max_tokens, room)
        limits_B = torch.tensor(
            [min(M, lm.max_length - len(p.tokens)) for p in prompts], device=device
        )
        uniform_BM = torch.stack([_uniforms(seed, M) for seed in seeds]).to(device)
        stops_K = torch.tensor(stops, device=device)

        store: list = []
        packed = PackedPlan([len(tokens) for tokens in distinct], device, store)
        tokens_T = torch.tensor([t for tokens in distinct for t in tokens], device=device)
        last_P = packed.cu_seqlens[1:].long() - 1
        hidden_BD = lm.run(tokens_T, packed)[last_P][rows_B]
        plan = DecodePlan(store, packed, rows_B)

        B = len(prompts)
        tokens_BM = torch.zeros(B, M, dtype=torch.int64, device=device)
        logp_BM = torch.zeros(B, M, device=device)
        length_B = torch.zeros(B, dtype=torch.int64, device=device)
        # the rows still in the batch, as places in the outputs
        alive_B = torch.arange(B, device=device)
        running_B = torch.ones(B, dtype=torch.bool, device=device)
        for m in range(M):
            drawn = draw(
                lm.head.logits(hidden_BD),
                uniform_BM[alive_B, m],
                sampling.temperature,
                sampling.top_p,
            )
            tokens_BM[alive_B, m], logp_BM[alive_B, m] = drawn
            length_B[alive_B] += running_B
            running_B &= ~torch.isin(drawn[0], stops_K) & (m + 1 < limits_B[alive_B])
            running, tokens_B = int(running_B.sum()), drawn[0]
            if running == 0:
                break
            if len(alive_B) - running >= DROP_SHARE * len(alive_B):
                keep = running_B.nonzero()[:, 0]
                plan.keep(keep)
                alive_B, tokens_B, running_B = alive_B[keep], tokens_B[keep], running_B[keep]
            plan.begin()
            hidden_BD = lm.run(tokens_B, plan)
        tokens, logps, lengths = tokens_BM.tolist(), logp_BM.tolist(), length_B.tolist()
        return [(t[:n], lp[:n]) for t, lp, n in zip(tokens, logps, lengths, strict=True)]

    @torch.no_grad()
    def sync(self, state_dict: dict[str, Tensor], version: int) -> None:
        own = self.lm.sync_state()
        if state_dict.keys() != own.keys():
            odd = sorted(state_dict.keys() ^ own.keys())
            raise ValueError(
                f"weights do not fit the model: {len(odd)} names differ, first of them {odd[0]!r}"
            )
        for name, tensor in state_dict.items():
            if tensor.data_ptr() != own[name].data_ptr():
                own[name].copy_(tensor)
        self.version = version

    def close(self) -> None:
        """Nothing to release: the weights are the trainer's."""


def _uniforms(seed: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, dtype=torch.float64, generator=generator)
