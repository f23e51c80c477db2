"""One life of the vLLM engine, and the helpers the engine tests share. Run as a script by them."""

import json
import random
import sys
from pathlib import Path

import torch

from r1 import toy
from r1.config import Model, Rollout
from r1.model import load
from r1.rollout import build
from r1.rollout.parity import SamplerMismatch, probe
from r1.rollout.transformers import TransformersEngine
from r1.types import Prompt, Sampling


def prompts_of(lm, count):
    rng = random.Random(0)
    questions = [toy.question(toy.expression(rng, 2, 4)) for _ in range(count)]
    return [
        Prompt(str(i), q, "", "chain_sum", tokens=tuple(lm.tokenizer.encode(q + "\n")))
        for i, q in enumerate(questions)
    ]


def seeds_of(count, n):
    return [[1000 * i + j for j in range(n)] for i in range(count)]


@torch.no_grad()
def logps_of(lm, prompts, completions, temperature=1.0, top_p=1.0):
    """Log-probabilities of completions, one full forward pass each."""
    out = []
    for prompt, completion in zip(prompts, completions, strict=True):
        tokens = torch.tensor([*prompt, *completion])
        hidden = lm.hidden(tokens, torch.tensor([0, len(tokens)]))[len(prompt) - 1 : -1]
        logp = torch.log_softmax(lm.head.logits(hidden) / temperature, -1)
        if top_p < 1:
            largest, order = logp.sort(-1, descending=True)
            outside = largest.exp().cumsum(-1) - largest.exp() >= top_p
            logp = logp.masked_fill(outside.gather(-1, order.argsort(-1)), -torch.inf)
            logp = torch.log_softmax(logp, -1)
        out.append(logp.gather(1, tokens[len(prompt) :, None])[:, 0])
    return out


def message(error, call):
    try:
        call()
    except error as raised:
        return str(raised)
    return "nothing was raised"


@torch.no_grad()
def perturb(lm):
    for parameter in lm.module.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))


def tokens_of(groups):
    return [list(c.tokens) for group in groups for c in group]


def main(folder):
    torch.manual_seed(0)
    random.seed(0)
    lm = load(Model(path="toy", dtype="float32"))
    config = Rollout(engine="vllm", max_tokens=32, max_prompt_tokens=48, kv_cache_gib=0.25)
    before = torch.get_rng_state(), random.getstate()
    engine = build(config, lm, folder)
    found = {"generators_kept": bool(torch.equal(before[0], torch.get_rng_state()))}
    found["generators_kept"] &= before[1] == random.getstate()
    found["weights_left"] = [str(path) for path in Path(folder).rglob("*.safetensors")]

    prompts = prompts_of(lm, 8)
    check = {"max_tokens": 12, "tolerance": 1e-3}

    def trainer(temperature):
        return lambda p, c: logps_of(lm, p, c, temperature)

    short = Sampling(n=1, max_tokens=2)
    found["parity"] = [probe(engine, trainer(1.0), prompts, **check)]
    found["versions"] = [engine.generate(prompts[:1], short, [[0]])[0][0].version]
    for version in (1, 2, 3):
        perturb(lm)
        if version == 3:
            found["stale"] = message(
                SamplerMismatch, lambda: probe(engine, trainer(1.0), prompts, **check)
            )
        engine.sync(lm.sync_state(), version)
        found["parity"].append(probe(engine, trainer(1.0), prompts, **check))
        found["versions"].append(engine.generate(prompts[:1], short, [[0]])[0][0].version)
    found["parity_at_0.7"] = probe(engine, trainer(0.7), prompts, temperature=0.7, **check)
    headless = dict(lm.module.named_parameters())
    found["without_head"] = message(ValueError, lambda: engine.sync(headless, 9))

    nucleus = Sampling(n=4, max_tokens=12, temperature=0.6, top_p=0.8)
    groups = engine.generate(prompts, nucleus, seeds_of(8, 4))
    pairs = [(p.tokens, c) for p, g in zip(prompts, groups, strict=True) for c in g]
    ours = logps_of(lm, [p for p, _ in pairs], [c.tokens for _, c in pairs], 0.6, 0.8)
    theirs = torch.tensor([x for _, c in pairs for x in c.logps])
    found["nucleus"] = float((torch.cat(ours) - theirs).abs().max())

    greedy = Sampling(n=1, max_tokens=16, temperature=0)
    ours = TransformersEngine(lm).generate(prompts, greedy, seeds_of(8, 1))
    theirs = engine.generate(prompts, greedy, seeds_of(8, 1))
    found["greedy"] = {"transformers": tokens_of(ours), "vllm": tokens_of(theirs)}

    sampling, seeds = Sampling(n=2, max_tokens=16), seeds_of(8, 2)
    found["together"] = tokens_of(engine.generate(prompts, sampling, seeds))
    found["again"] = tokens_of(engine.generate(prompts, sampling, seeds))
    found["alone"] = [
        tokens
        for prompt, row in zip(prompts, seeds, strict=True)
        for tokens in tokens_of(engine.generate([prompt], sampling, [row]))
    ]

    stops = tuple(range(10, 30))
    stopping = Sampling(n=4, max_tokens=6, stop_token_ids=stops)
    flat = [c for group in engine.generate(prompts, stopping, seeds_of(8, 4)) for c in group]
    found["stops"] = [
        [c.finish, c.tokens[-1] in stops, bool(set(c.tokens[:-1]) & set(stops)), len(c.tokens)]
        for c in flat
    ]

    long = Prompt("long one", "", "", "", tokens=(5,) * 80)
    found["too_long"] = message(ValueError, lambda: engine.generate([long], short, [[0]]))
    engine.close()
    # more than any machine can address
    large = Rollout(engine="vllm", max_tokens=32, max_prompt_tokens=48, kv_cache_gib=1e7)
    found["no_start"] = message(RuntimeError, lambda: build(large, lm, folder))
    (Path(folder) / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
