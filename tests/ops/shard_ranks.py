"""The ranks of test_shards.py: `python tests/ops/shard_ranks.py RANKS FOLDER`.

One process per rank (gloo, a file as the store), all cases in each; what a rank found is written to
FOLDER/<rank>.pt. Forked after the imports, which cost more than the cases.
"""

import contextlib
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from conftest import available_backends
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from benchmarks.poison import poisoned_memory
from r1kernels import (
    PolicyObjective,
    backend,
    batch_invariant,
    head_inputs,
    linear_logp,
    linear_loss,
    linear_policy_loss,
    use_backend,
)
from r1kernels.check import IGNORE
from r1kernels.reference.token_logp import Logp

TIMEOUT = timedelta(seconds=60)
SIZES = {
    2: {"even": (150, 150), "uneven": (7, 324), "one": (330, 1)},
    4: {"even": (80, 80, 80, 80), "uneven": (100, 1, 223, 7), "one": (1, 1, 1, 328)},
}
LENGTHS = torch.tensor([0, 9, 10, 24, 33])
OBJECTIVES = {
    "r1": PolicyObjective.r1(),
    "gspo": PolicyObjective.gspo(),
    "quantile": PolicyObjective(entropy_coef=0.1, top_entropy_quantile=0.5),
}


# The interpreter takes most of the time; what these cases add is not the kernels' work.
ON_CPU = ("reference", "native")


class Case(NamedTuple):
    op: str  # "logp", "loss" or a name of OBJECTIVES
    sizes: str = "uneven"
    options: dict = {}  # noqa: RUF012
    head: bool = True  # takes gradients
    only: str | None = None  # the one output of linear_logp that the gradient comes from
    bias: bool = False
    lora: bool = False
    rows: str = "random"
    prior: str = "none"
    chunked: bool = False
    dtype: torch.dtype = torch.float32
    backends: tuple[str, ...] = ("reference", "native", "triton")


ALL = {"entropy": True, "softcap": 8.0, "logit_scale": 1.3, "temperature": "rows"}
CASES = {
    "plain": Case("logp", backends=ON_CPU),
    "plain, even": Case("logp", "even", {"temperature": 0.8}, backends=ON_CPU),
    "one column": Case("logp", "one", {"entropy": True}),
    "all": Case("logp", options=ALL, bias=True, chunked=True),
    "frozen": Case("logp", options={"temperature": 0.7}, head=False, only="logp", chunked=True),
    "frozen, all": Case("logp", "even", ALL, head=False, only="entropy", bias=True),
    "frozen, lse": Case("logp", head=False, only="lse", backends=ON_CPU),
    "peaked": Case("logp", options={"entropy": True}, rows="peaked", prior="near"),
    "steep": Case("logp", options={"entropy": True}, rows="steep", chunked=True),
    "steep, frozen": Case("logp", head=False, only="logp", rows="steep"),
    "prior off": Case("logp", options={"entropy": True}, prior="off", backends=ON_CPU),
    "impossible": Case("logp", options={"entropy": True}, bias=True, rows="impossible"),
    "r1": Case("r1", chunked=True),
    "r1, steep": Case("r1", "even", rows="steep", prior="near", bias=True),
    "gspo": Case("gspo", chunked=True),
    "quantile": Case("quantile", options=ALL, chunked=True, backends=ON_CPU),
    "loss": Case("loss", options={"entropy": True}, bias=True, chunked=True),
    "lora": Case("loss", lora=True, head=False),
    "lora, logp": Case("logp", lora=True, backends=ON_CPU),
    "bfloat16": Case("r1", dtype=torch.bfloat16, backends=ON_CPU),
    "float16": Case("r1", dtype=torch.float16),
}


class Inputs(NamedTuple):
    """The whole vocabulary."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None
    lora: tuple[Tensor, Tensor, float] | None
    options: dict
    streams: dict

    def leaves(self, head: bool, columns: slice = slice(None), dtype=None) -> "Inputs":
        def leaf(x, gradient=True):
            x = x.detach().to(dtype or x.dtype).clone()
            return x.requires_grad_(gradient)

        hidden, weight, _, bias, lora, options, streams = self
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return self._replace(
            hidden=leaf(hidden),
            weight=leaf(weight[columns], head),
            bias=None if bias is None else leaf(bias[columns], head),
            lora=None if lora is None else (leaf(lora[0]), leaf(lora[1][columns]), lora[2]),
            options={k: v.to(wide) if isinstance(v, Tensor) else v for k, v in options.items()},
            streams={k: v.to(wide) for k, v in streams.items()},
        )

    def trained(self) -> dict[str, Tensor]:
        given = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}
        if self.lora:
            given |= {"lora_a": self.lora[0], "lora_b": self.lora[1]}
        return {f"d{name}": x for name, x in given.items() if x is not None and x.requires_grad}


def make(case: Case, ranks: int) -> Inputs:
    """The same on every rank: 33 rows, an ignored one, targets on every rank's edges."""
    generator = torch.Generator().manual_seed(3)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    T, D, sizes = 33, 24, SIZES[ranks][case.sizes]
    V = sum(sizes)
    hidden, weight = randn(T, D), randn(V, D) / D**0.5
    targets = torch.randint(0, V, (T,), generator=generator)
    ends = torch.tensor(sizes).cumsum(0)
    targets[:ranks], targets[ranks : 2 * ranks] = ends - 1, ends - torch.tensor(sizes)
    targets[12] = IGNORE
    bias = randn(V) if case.bias else None
    if case.rows == "peaked":
        at = torch.arange(0, 12, 2)
        weight[targets[at]] = hidden[at] * (12.0 / D**0.5)
    if case.rows == "steep":  # one column tops the targets of these rows by 60 and 25 nats
        weight[ends[0] - 1] = 60 * hidden[20] / hidden[20].square().sum()
        weight[V - 1] = 25 * hidden[21] / hidden[21].square().sum()
        targets[20:22] = V // 2
    if case.rows == "impossible":
        bias[: ends[0]] = -torch.inf
    options = dict(case.options)
    if options.get("temperature") == "rows":
        options["temperature"] = torch.rand(T, generator=generator) + 0.5
    base = torch.log_softmax(hidden @ weight.T, -1).gather(-1, targets.clamp(min=0)[:, None])[:, 0]
    if case.prior != "none":
        options["prior"] = base + (200 if case.prior == "off" else 0.3) * randn(T)
    lora = (randn(3, D), randn(V, 3) / 4, 0.5) if case.lora else None
    hidden[12] = torch.nan
    names = {"logp_old": 0.2, "logp_ref": 0.1, "logp_sampler": 0.25}
    return Inputs(
        hidden.to(case.dtype),
        weight.to(case.dtype),
        targets,
        None if bias is None else bias.to(case.dtype),
        lora,
        options,
        {name: base + spread * randn(T) for name, spread in names.items()},
    )


def token_loss(logp: Tensor, entropy: Tensor | None, rows: Tensor) -> Tensor:
    loss = torch.tanh(logp / 4) * (1 + rows.to(logp.dtype) / 7)
    return loss if entropy is None else loss - 0.1 * entropy


def through(out: Logp, only: str | None) -> Tensor:
    """A fixed random combination of the outputs, or of one."""
    generator = torch.Generator().manual_seed(7)
    total = 0.0
    for name, x in out._asdict().items():
        if x is not None:
            factor = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)
            # Nothing comes back from an impossible target, whose logp is -inf.
            if only in (None, name):
                total = total + torch.where(x.isfinite(), factor * x, 0).sum()
    return total


ADVANTAGES = torch.tensor([1.0, -0.5, 0.0, -1.5])


def call(case: Case, given: Inputs, **more) -> dict[str, Tensor]:
    """What the op returns and every gradient, by name."""
    head = given.hidden, given.weight, given.targets
    settings = {"bias": given.bias, "lora": given.lora, **given.options, **more}
    if case.op == "logp":
        out = linear_logp(*head, **settings)
        found = {name: x for name, x in out._asdict().items() if x is not None}
        loss = through(out, case.only)
    elif case.op == "loss":
        loss = linear_loss(*head, token_loss, **settings)
        found = {"loss": loss}
    else:
        out = linear_policy_loss(
            *head, ADVANTAGES, OBJECTIVES[case.op], cu_seqlens=LENGTHS, **given.streams, **settings
        )
        loss = out.loss
        metrics = {f"metrics[{name}]": x for name, x in out.metrics.items()}
        found = {"loss": loss, "logp": out.logp, **metrics}
    trained = given.trained()
    grads = torch.autograd.grad(3 * loss, list(trained.values()))
    return {k: v.detach() for k, v in (found | dict(zip(trained, grads, strict=True))).items()}


@contextlib.contextmanager
def chunks_of(rows: int) -> Iterator[None]:
    """Chunks of so many rows under workspace_mb=1, whatever the backend."""
    with contextlib.ExitStack() as stack:
        for name in available_backends():
            chunk = backend.load("linear_logp", name).HeadChunk
            size = staticmethod(lambda head: 2**20 // rows)
            stack.enter_context(mock.patch.object(chunk, "bytes_per_row", size))
        yield


class Rank:
    """One process's part."""

    def __init__(self, rank: int, ranks: int):
        self.rank, self.ranks, self.group = rank, ranks, dist.group.WORLD

    def columns(self, case: Case) -> slice:
        sizes = SIZES[self.ranks][case.sizes]
        first = sum(sizes[: self.rank])
        return slice(first, first + sizes[self.rank])

    def run(self, case: Case, **more) -> dict[str, Tensor]:
        whole = make(case, self.ranks)
        settings = {"group": self.group, "workspace_mb": 1 if case.chunked else None} | more
        # No two ranks would cut alike.
        with chunks_of(16 + self.rank) if case.chunked else contextlib.nullcontext():
            return call(case, whole.leaves(case.head, self.columns(case)), **settings)

    def cases(self) -> Iterator[tuple[str, object]]:
        for name in available_backends():
            with use_backend(name):
                for title, case in CASES.items():
                    if name in case.backends:
                        first, same = self.run(case), True
                        if name in ON_CPU or title == "steep":
                            again = self.run(case)
                            same = all(equal(first[k], again[k]) for k in first)
                        yield f"{title} {name}", (first, same)
                yield f"paths {name}", self.paths()
                yield f"empty {name}", self.empty()

    def paths(self) -> list[Tensor]:
        """logp of the same rows by every path."""
        case = CASES["plain"]._replace(chunked=True)
        with torch.no_grad():
            whole = make(case, self.ranks).leaves(False, self.columns(case))
            with chunks_of(16):
                plain = linear_logp(*whole[:3], group=self.group, workspace_mb=1).logp
        others = [case._replace(head=False, only="logp"), case._replace(op="r1"), case]
        return [plain, *(self.run(x)["logp"] for x in others)]

    def empty(self) -> list[Tensor]:
        found = []
        weight = torch.randn(3 + self.rank, 8, requires_grad=True)
        for targets in (torch.zeros(0, dtype=torch.int64), torch.full((3,), IGNORE)):
            hidden = torch.full((len(targets), 8), torch.nan, requires_grad=True)
            out = linear_logp(hidden, weight, targets, entropy=True, group=self.group)
            found += [*out, *torch.autograd.grad(out.logp.sum() + out.lse.sum(), (hidden, weight))]
        return [x.detach() for x in found]

    def dtensor(self) -> dict[str, object]:
        """A head split by DTensor on one dimension of a mesh, and what is refused."""
        case = CASES["all"]
        whole = make(case, self.ranks)
        mesh = init_device_mesh("cpu", (1, self.ranks), mesh_dim_names=("data", "vocabulary"))
        group, over = mesh.get_group("vocabulary"), [Replicate(), Shard(0)]
        weight, bias = (
            distribute_tensor(x, mesh, over).requires_grad_() for x in (whole.weight, whole.bias)
        )
        given = whole.leaves(True)._replace(weight=weight, bias=bias)
        with use_backend("native"):
            found = call(case, given, group=group)
        for name in ("dweight", "dbias"):
            assert isinstance(found[name], DTensor) and list(found[name].placements) == over
            found[name] = found[name].full_tensor()
        wrong = weight.detach().redistribute(mesh, [Replicate(), Replicate()])
        found["replicated"] = refusal(
            lambda: linear_logp(*whole[:1], wrong, whole.targets, group=group)
        )
        return found

    def errors(self) -> dict[str, str]:
        """What every rank gets to see when one of them errs; all go on afterwards."""
        hidden, weight = torch.randn(4, 8), torch.randn(5, 8)
        targets, last = torch.tensor([0, 3, 9, 1]), self.rank == self.ranks - 1
        torch.manual_seed(self.rank)

        def plain() -> None:
            linear_logp(hidden, weight, targets, group=self.group)

        def no_backend() -> None:
            error = RuntimeError("no backend runs linear_logp")
            with mock.patch.object(head_inputs, "implementation", side_effect=error):
                plain()

        calls = {
            "width": lambda: linear_logp(
                hidden, weight[:, :7] if last else weight, targets, group=self.group
            ),
            "mask": lambda: linear_policy_loss(
                *(hidden, weight, targets, torch.ones(4), PolicyObjective.dapo()),
                mask=torch.ones(3 if last else 4),
                group=self.group,
            ),
            "rows": lambda: linear_logp(
                hidden[: 3 if last else 4], weight, targets[: 3 if last else 4], group=self.group
            ),
            "option": lambda: linear_logp(hidden, weight, targets, entropy=last, group=self.group),
            "gradients": lambda: linear_loss(
                hidden, weight.clone().requires_grad_(last), targets, token_loss, group=self.group
            ),
            "targets": lambda: linear_logp(
                hidden, weight, targets.clone().fill_(self.rank), group=self.group
            ),
            "range": lambda: linear_logp(
                hidden, weight, targets + 5 * self.ranks, group=self.group
            ),
            "type": lambda: linear_logp(hidden, weight, targets, group="0"),
            "backend": no_backend if last else plain,
        }
        found = {name: refusal(fn) for name, fn in calls.items()}
        out = linear_logp(hidden, weight, targets, group=self.group)
        return found | {"after": str(bool(out.logp.isfinite().all()))}

    def invariant(self) -> bool:
        """Whether a row has the same bits among others and with two of them."""
        case, found = CASES["frozen"], []
        whole = make(case, self.ranks).leaves(False, self.columns(case))
        at = torch.tensor([7, 20, 31])
        with use_backend("native"), batch_invariant():
            for rows in (torch.arange(len(whole.targets)), at):
                hidden = whole.hidden.detach()[rows].requires_grad_()
                targets = whole.targets[rows]
                logp = linear_logp(hidden, whole.weight, targets, group=self.group).logp
                found.append((logp.detach(), *torch.autograd.grad(logp.sum(), hidden)))
        return all(equal(a[at], b) for a, b in zip(*found, strict=True))

    def alone(self) -> bool:
        groups = [dist.new_group([rank]) for rank in range(self.ranks)]
        whole = make(CASES["plain"], self.ranks)
        plain = linear_logp(whole.hidden, whole.weight, whole.targets)
        alone = linear_logp(whole.hidden, whole.weight, whole.targets, group=groups[self.rank])
        return equal(plain.logp, alone.logp) and equal(plain.lse, alone.lse)

    def compiled(self) -> bool:
        case = CASES["all"]
        whole = make(case, self.ranks)
        given = [whole.leaves(True, self.columns(case)) for _ in range(2)]

        def run(hidden, weight, bias):
            options = {**given[0].options, "bias": bias, "group": self.group}
            out = linear_logp(hidden, weight, whole.targets, **options)
            return out.logp.sum() + out.entropy.sum() + out.lse.sum()

        found = []
        for fn, leaves in zip(
            (run, torch.compile(run, fullgraph=True, backend="aot_eager")), given, strict=True
        ):
            inputs = leaves.hidden, leaves.weight, leaves.bias
            loss = fn(*inputs)
            found.append([loss.detach(), *torch.autograd.grad(loss, inputs)])
        return all(equal(a, b) for a, b in zip(*found, strict=True))

    def rounding(self) -> Tensor:
        """The sum of a row's logit gradients where the kernels round what they store."""
        from r1kernels._triton import head_kernels
        from r1kernels._triton import linear_logp as triton_head

        hidden = torch.randn(9, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        weight = torch.ones(40 + self.rank, 8)
        bias = torch.randn(weight.shape[0], generator=torch.Generator().manual_seed(self.rank))
        targets = torch.arange(9) * 5
        found = []
        with contextlib.ExitStack() as stack:
            stack.enter_context(use_backend("triton"))
            for module in (head_kernels, triton_head):
                rounds = lambda dtype: torch.bfloat16  # noqa: E731
                stack.enter_context(mock.patch.object(module, "store_dtype", rounds))
            for options in ({}, {"entropy": True}):
                out = linear_logp(hidden, weight, targets, bias=bias, group=self.group, **options)
                loss = out.logp.sum() + (out.entropy.sum() if options else 0)
                found += torch.autograd.grad(loss, hidden)
        return torch.stack(found)


def equal(a: Tensor, b: Tensor) -> bool:
    """Bitwise, NaN as itself."""
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5))


def refusal(fn) -> str:
    try:
        fn()
    except (RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def work(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=TIMEOUT
    )
    with poisoned_memory():
        part = Rank(rank, ranks)
        found = dict(part.cases())
        for name in ("errors", "dtensor", "alone", "invariant", "compiled", "rounding"):
            found[name] = getattr(part, name)()
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.start_processes(
        work, (int(sys.argv[1]), Path(sys.argv[2])), nprocs=int(sys.argv[1]), start_method="fork"
    )
