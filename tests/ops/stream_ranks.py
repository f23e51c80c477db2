"""The two ranks of test_stream.py: `python tests/ops/stream_ranks.py FOLDER`.

Each streams sequences of its own under DistributedDataParallel; what it found goes to
FOLDER/<rank>.pt.
"""

import collections
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from r1kernels.stream_model import stream_model
from tests.ops.stream_cases import OFFSETS, TOKENS, VOCABULARY, build

RANKS = 2


def batch(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and a gradient of their hidden states."""
    draw = torch.Generator().manual_seed(rank)
    tokens = torch.randint(VOCABULARY, (TOKENS,), generator=draw)
    return tokens, torch.randn(TOKENS, 32, generator=draw)


def model():
    """With a tied head, whose gradient comes from two places."""
    return build("Qwen2", tie_word_embeddings=True).float()


def loss(trained, stream, rank: int) -> torch.Tensor:
    """Through the hidden states, and through the head once more."""
    tokens, dhidden = batch(rank)
    hidden = stream(tokens, cu_seqlens=OFFSETS)
    return (hidden * dhidden).sum() + (hidden @ trained.lm_head.weight.T).square().mean()


def refused(trained) -> str:
    """What a weight in shards is answered with."""
    projection = trained.model.layers[1].mlp.up_proj
    mesh = init_device_mesh("cpu", (RANKS,))
    projection.weight = torch.nn.Parameter(distribute_tensor(projection.weight.detach(), mesh))
    try:
        stream_model(trained)
    except ValueError as error:
        return str(error)
    return "nothing"


def run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(f"{folder}/store", RANKS), rank=rank, world_size=RANKS,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    trained, fired = model(), collections.Counter()
    for name, x in trained.named_parameters():
        x.register_post_accumulate_grad_hook(lambda _, name=name: fired.update([name]))
    stream = DistributedDataParallel(stream_model(trained, chunk_size=16))
    loss(trained, stream, rank).backward()
    grads = {name: x.grad for name, x in trained.named_parameters()}
    torch.save((grads, dict(fired), refused(trained)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    # Forked after the imports, which cost more than the ranks' work.
    torch.multiprocessing.start_processes(
        run, args=(str(Path(sys.argv[1])),), nprocs=RANKS, start_method="fork"
    )
