"""Sampling with vLLM in this process. Every use of vLLM's API is in this file.

Written against 0.31 and 0.32. Weights arrive by its layerwise reload, which takes an iterator and
so works inside one process only. The prefix cache is emptied after each, because vLLM leaves stale
entries to its user, and before each call.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from r1.rollout import check_request, completion, stop_tokens
from r1.types import Completion, Prompt, Sampling

if TYPE_CHECKING:
    from r1.config import Rollout
    from r1.model import CausalLM

# tokens asked for in one call from which on a progress bar is shown
LONG = 1 << 18
INSTEAD = 'rollout.engine = "transformers" samples without vLLM.'


class VllmEngine:
    """vLLM in the trainer's process, on the CPU or sharing the trainer's GPU.

    Prompts are token ids and vLLM sees no tokenizer: it would rebuild the embedded model's from the
    model type, wrongly. On the CPU vLLM turns torch.set_num_threads off for the whole process, so
    the number of threads must be set before the engine starts.

    Args:
        config: the [rollout] section.
        lm: weights, data type and context; its current weights are written to `folder`.
        folder: where the model folder that vLLM starts from is written.
        seed: of vLLM's own generator, which no request uses.

    Raises: RuntimeError when vLLM is missing or does not start.
    """

    name = "vllm"

    def __init__(
        self, config: Rollout, lm: CausalLM, folder: str | os.PathLike[str], *, seed: int = 0
    ):
        self.lm = lm
        self.version = 0
        self.max_length = min(lm.max_length, config.max_prompt_tokens + config.max_tokens)
        on_cpu = lm.device.type == "cpu"
        model_folder = Path(folder) / "vllm_start"
        lm.save(model_folder)
        with _generators_kept(), warnings.catch_warnings():
            # vLLM looks at every attribute of torch's modules, deprecated ones too
            warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
            vllm = _import(on_cpu, config.kv_cache_gib)
            try:
                self._llm = vllm.LLM(
                    model=str(model_folder),
                    dtype=str(lm.dtype).removeprefix("torch."),
                    seed=seed,
                    skip_tokenizer_init=True,
                    max_model_len=self.max_length,
                    enforce_eager=config.enforce_eager or on_cpu,
                    # probabilities of what was drawn from, not of the raw logits
                    logprobs_mode="processed_logprobs",
                    disable_log_stats=True,
                    use_tqdm_on_load=False,
                    **_limits(on_cpu, config),
                )
            # whatever its start raises, the user needs the cause and the way round in one message
            except Exception as error:
                raise RuntimeError(
                    f"vLLM {vllm.__version__} did not start: {type(error).__name__}: {error}. "
                    f"{INSTEAD}"
                ) from error
        # a second copy of a large model; later weights come by `sync`
        for file in model_folder.glob("*.safetensors"):
            file.unlink()
        self._params = vllm.SamplingParams

    def generate(
        self, prompts: list[Prompt], sampling: Sampling, seeds: list[list[int]]
    ) -> list[list[Completion]]:
        check_request(prompts, sampling, seeds, self.max_length)
        stops = stop_tokens(self.lm, sampling)
        inputs, params = [], []
        for prompt, row in zip(prompts, seeds, strict=True):
            limit = min(sampling.max_tokens, self.max_length - len(prompt.tokens))
            for seed in row:
                inputs.append({"prompt_token_ids": list(prompt.tokens)})
                params.append(
                    self._params(
                        n=1,
                        seed=seed,
                        max_tokens=limit,
                        temperature=sampling.temperature,
                        top_p=sampling.top_p,
                        stop_token_ids=list(stops),
                        # the end of sequence is in `stops`, unless the request leaves it out
                        ignore_eos=True,
                        # the sampled token's own log-probability and no other
                        logprobs=0,
                        detokenize=False,
                    )
                )
        if not inputs:
            return []
        # what an earlier call left cached may be rounded otherwise than what is computed, and a
        # resumed run starts with nothing cached
        self._empty_cache()
        bar = _bar(sum(one.max_tokens for one in params))
        outputs = self._llm.generate(inputs, params, use_tqdm=bar)
        flat = []
        for output in outputs:
            sampled = output.outputs[0]
            tokens = list(sampled.token_ids)
            logps = [
                step[token].logprob for token, step in zip(tokens, sampled.logprobs, strict=True)
            ]
            flat.append(completion(self.lm, tokens, logps, stops, self.version))
        return [flat[p * sampling.n : (p + 1) * sampling.n] for p in range(len(prompts))]

    def sync(self, state_dict: dict[str, Tensor], version: int) -> None:
        if "lm_head.weight" not in state_dict:
            raise ValueError(
                "weights must hold lm_head.weight even when tied: use CausalLM.sync_state"
            )
        self._llm.collective_rpc(
            "reload_weights", kwargs={"weights_iterator": iter(state_dict.items())}
        )
        self._empty_cache()
        self.version = version

    def _empty_cache(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache: blocks are still in use")

    def close(self) -> None:
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None


def _bar(tokens: int) -> Callable[..., tqdm] | bool:
    """A bar, gone when it is done, for what may take long; none where nobody watches."""
    return sys.stderr.isatty() and tokens >= LONG and functools.partial(tqdm, leave=False)


def _import(on_cpu: bool, kv_cache_gib: float):
    """Import vLLM with its environment set first: it reads most of it once."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if on_cpu:
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(math.ceil(kv_cache_gib))
        # binding would pin the trainer's threads too
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    try:
        import vllm
    except ImportError as error:
        package = "vllm-cpu" if on_cpu else "vllm"
        raise RuntimeError(
            f'rollout.engine = "vllm" needs {package}: {error}. {INSTEAD}'
        ) from error
    return vllm


def _limits(on_cpu: bool, config: Rollout) -> dict[str, float | int]:
    if on_cpu:
        cache = max(1, int(config.kv_cache_gib * 2**30))
        return {"kv_cache_memory_bytes": cache, "max_num_seqs": config.batch}
    return {"gpu_memory_utilization": config.gpu_memory_utilization}


@contextlib.contextmanager
def _generators_kept() -> Iterator[None]:
    """vLLM's start reseeds the global generators; put them back."""
    import numpy

    kept = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(kept[0])
        numpy.random.set_state(kept[1])
        torch.set_rng_state(kept[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
