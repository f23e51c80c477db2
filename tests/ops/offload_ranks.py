"""Two ranks of test_offloaded_checkpoint.py: `python tests/ops/offload_ranks.py FOLDER`.

Layers under DistributedDataParallel and under FSDP2, checkpointed by ours, beside the plain model
on the rows of all ranks. Each rank writes what it found to FOLDER/<rank>.pt.
"""

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from r1kernels import host_store, pinned_pool
from r1kernels.host_store import HostStore
from r1kernels.offloaded_checkpoint import offloaded_checkpoint
from tests.ops.fake_streams import EagerStreams

RANKS = 2
T, D = 6, 8


class Model(nn.Module):
    """Layers that run by `offloaded_checkpoint` where they have a store."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.store: HostStore | None = None
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(D, 16), nn.GELU(), nn.Linear(16, D)) for _ in range(3)
        ).double()

    def forward(self, x):
        for layer in self.layers:
            x = layer(x) if self.store is None else offloaded_checkpoint(layer, x, store=self.store)
        return x


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of the mean over rows; two backwards, which add up."""
    for _ in range(2):
        model(x).square().mean(0).sum().backward()
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        found[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return found


def run(rank: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=60),
    )
    x = torch.randn(RANKS * T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mine = x[rank * T : (rank + 1) * T]
    found = {"plain": gradients(Model(), x), "host": []}

    model = Model()
    model.store = HostStore(streams=EagerStreams())
    wrapped = gradients(DistributedDataParallel(model), mine)
    found["ddp"] = {name.removeprefix("module."): x for name, x in wrapped.items()}
    found["host"].append(model.store.usage().host)

    model = Model()
    model.store = HostStore(streams=EagerStreams())
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    found["fsdp"] = gradients(model, mine)
    found["host"].append(model.store.usage().host)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    host_store.SMALL, host_store.BLOCK = 1, 128
    pinned_pool.BLOCK, pinned_pool.SLAB = 128, 1024
    # Forked after the imports, which take longer than the work.
    child = os.fork()
    if child == 0:
        try:
            run(1, folder)
        except BaseException:  # a forked child must not go on as its parent
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    run(0, folder)
    status = os.waitpid(child, 0)[1]
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
