"""`tile_mlps(model)`: the MLPs of a transformers model run as `tiled_mlp`, and back."""

import types
import warnings
from collections.abc import Callable

from torch import Tensor, nn

from r1kernels.check import describe
from r1kernels.projection import Projection, linear_parts, projection, refuse_hooks
from r1kernels.tiled_mlp import Mlp, autocast_rows, check_tile_rows, run_mlp

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# Classes of transformers whose forward is down(act(gate(x)) * up(x)) and nothing else.
CLASSES = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")
# Names that a decoder layer gives its MLP, dense or not.
PLACES = ("mlp", "feed_forward", "block_sparse_moe")
# Classes of activations, torch's and transformers', to the names that `tiled_mlp` knows.
ACTIVATION_OF = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
}


class TiledMlps(list):
    """The names of the modules that run tiled; a context manager that undoes it at its end."""

    def __init__(self, modules: dict[str, nn.Module], forwards: dict[str, Callable]):
        super().__init__(modules)
        self._modules, self._forwards = modules, forwards

    def __enter__(self) -> "TiledMlps":
        return self

    def __exit__(self, *exc: object) -> None:
        self.undo()

    def undo(self) -> list[str]:
        """Gives every module its own forward back; the names of those that had it taken.

        A forward that someone else has replaced since is left, with a warning.
        """
        undone = []
        for name, forward in self._forwards.items():
            module = self._modules[name]
            if vars(module).get("forward") is not forward:
                warnings.warn(f"{name}.forward was replaced by someone else", stacklevel=2)
                continue
            del module.forward
            undone.append(name)
        self._forwards = {}
        return undone


def tile_mlps(model: nn.Module, tile_rows: int | None = None) -> TiledMlps:
    """Makes every MLP of a transformers model run as `tiled_mlp`.

    For Llama, Mistral, Qwen 2, 2.5 and 3. Parameters, their names and the state dict stay as they
    are; linear layers may be wrapped by PEFT's LoRA (one active adapter, no dropout, no variant).
    To be called before FSDP2's `fully_shard` or after it, which has to be applied to the MLP or to
    a module around it, not to its projections. Weights under `torch.autocast` are cast in the op.

    Args:
        model: the model, or any module that contains decoder layers.
        tile_rows: as in `tiled_mlp`.

    Returns:
        The names of the modules; `with tile_mlps(model): ...` undoes it at the end, `.undo()` now.

    Raises: ValueError, naming the module, on an MLP of another kind, on one that already has a
        forward of its own or hooks on its projections, on a model without any. Nothing is then
        changed. TypeError on what is no module; on tile_rows what `tiled_mlp` raises.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {describe(model)}")
    check_tile_rows(tile_rows)
    modules = {name: module for name, module in model.named_modules() if _is_mlp(name, module)}
    if not modules:
        raise ValueError(
            f"{type(model).__name__} has no MLP: no module of it is called {', '.join(PLACES)}"
        )
    for name, module in modules.items():
        check_mlp(name, module)
    forwards = {
        name: types.MethodType(_tiled_forward(name, tile_rows), module)
        for name, module in modules.items()
    }
    for name, forward in forwards.items():
        modules[name].forward = forward
    return TiledMlps(modules, forwards)


def check_mlp(name: str, module: nn.Module) -> None:
    """Raises: ValueError, naming the module, unless `mlp_of` computes what a call of it does."""
    known = [cls for cls in type(module).__mro__ if _is_known(cls)]
    if not known or type(module).forward is not known[0].forward:
        raise ValueError(
            f"{name} is a {type(module).__module__}.{type(module).__name__}: no MLP that can be "
            f"tiled (transformers' {', '.join(CLASSES)} can)"
        )
    if type(module.act_fn).__name__ not in ACTIVATION_OF:
        raise ValueError(
            f"{name}.act_fn is a {type(module.act_fn).__name__}: an activation that cannot be "
            f"tiled ({', '.join(ACTIVATION_OF)} can)"
        )
    if "forward" in vars(module):
        raise ValueError(f"{name} has a forward of its own, tiled already or another library's")
    for part in PROJECTIONS:
        linear_parts(f"{name}.{part}", getattr(module, part))
        refuse_hooks(f"{name}.{part}", getattr(module, part))


def mlp_of(name: str, module: nn.Module, x: Tensor) -> Mlp:
    """What a checked module computes of rows x [..., D], with the weights it has now."""
    D = x.shape[-1]

    def part(key: str, inputs: int, outputs: int | None = None) -> Projection:
        title = f"{name}.{key}"
        return projection(title, x, *linear_parts(title, getattr(module, key)), inputs, outputs)

    gate = part("gate_proj", D)
    width = len(gate.weight_NK)
    up, down = part("up_proj", D, width), part("down_proj", width, D)
    return Mlp(gate, up, down, ACTIVATION_OF[type(module.act_fn).__name__])


def _is_known(cls: type) -> bool:
    return cls.__name__ in CLASSES and cls.__module__.startswith("transformers.models.")


def _is_mlp(name: str, module: nn.Module) -> bool:
    return name.rpartition(".")[2] in PLACES or any(map(_is_known, type(module).__mro__))


def _tiled_forward(name: str, tile_rows: int | None) -> Callable:
    def forward(module: nn.Module, x: Tensor) -> Tensor:
        x = autocast_rows(x)
        return run_mlp(x, mlp_of(name, module, x), tile_rows)

    return forward
