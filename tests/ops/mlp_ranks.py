"""A stack of tiled MLPs under DDP and FSDP2, on two processes (gloo, a file as the store).

`python mlp_ranks.py FOLDER` writes what a rank found to FOLDER/RANK.pt.
"""

import copy
import sys
from collections import Counter
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from r1kernels import tiled_mlp

RANKS, T, D, I = 2, 22, 8, 12


class Layer(nn.Module):
    """x + MLP(x), the MLP tiled: 11 rows of a rank in tiles of 4."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(D, I), nn.Linear(D, I), nn.Linear(I, D)
        # Frozen: its gradient is none of DDP's business.
        self.down.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        parts = (self.gate, self.up, self.down)
        biases = {"gate_bias": self.gate.bias, "up_bias": self.up.bias, "down_bias": self.down.bias}
        return x + tiled_mlp(x, *(part.weight for part in parts), **biases, tile_rows=4)


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.checkpoint = False

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpoint else layer(x)
        return x


def make() -> Stack:
    torch.manual_seed(0)
    return Stack()


def rows() -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(1))


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """By name; whole where they are sharded."""
    return {
        name.removeprefix("module."): getattr(p.grad, "full_tensor", lambda p=p: p.grad)()
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=60),
    )
    part, whole, found = rows().chunk(RANKS)[rank], make(), {}
    for way in ("ddp", "fsdp"):
        for more in ("", " checkpoint"):
            model = copy.deepcopy(whole)
            model.checkpoint = bool(more)
            if way == "ddp":
                calls = Counter()
                for name, p in model.named_parameters():
                    if p.requires_grad:
                        p.register_post_accumulate_grad_hook(
                            lambda _, name=name, calls=calls: calls.update([name])
                        )
                model = DistributedDataParallel(model)
            else:
                mesh = init_device_mesh("cpu", (RANKS,))
                for layer in model.layers:
                    fully_shard(layer, mesh=mesh)
                fully_shard(model, mesh=mesh)
            loss(model, part).backward()
            found[way + more] = gradients(model)
            if way == "ddp":
                found[f"{way}{more} hooks"] = dict(calls)
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.start_processes(
        work, (Path(sys.argv[1]),), nprocs=RANKS, start_method="fork"
    )
