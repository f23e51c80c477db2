"""Activation checkpointing whose inputs wait in host memory, of a function or a whole decoder."""

import weakref
from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from r1kernels import check
from r1kernels.host_store import PLAIN, Handle, HostStore
from r1kernels.saved_attention import OutputAndLse, Remembering


# As torch's checkpoint. torch.compiler.disable would import the compiler here, for two seconds.
@torch._disable_dynamo
def offloaded_checkpoint(
    function: Callable,
    *args: object,
    store: HostStore | None = None,
    save_attention: bool = False,
    **kwargs: object,
) -> object:
    """function(*args, **kwargs), of which only the inputs are kept for the backward, in `store`.

    The backward runs the function again, by torch's non-reentrant checkpoint: random numbers,
    autocast, nesting, frozen inputs, hooks and any way to call a backward are as there. A
    positional tensor of a floating dtype goes through the store, unless it is a leaf that takes a
    gradient: such a one stays on the device anyway. What is passed by keyword, or inside a partial
    or a container, stays where it is: tables and masks that all layers share belong there.

    While a call runs its backward, the inputs of the call before it on the same store are brought
    back. On a CPU nothing is copied, and the result is that of `torch.utils.checkpoint`.

    Args:
        function: anything callable, a compiled module too; must do the same when it is run again.
        store: where inputs wait; None: one store of this process that keeps nothing on the GPU but
            what was put last. Share one among layers: it has the pinned memory.
        save_attention: output and log-sum-exp of every `varlen_attention` and `prefix_attention` in
            the function are kept in the store too, and not computed again.

    Returns:
        What the function returns.

    Gradients: bit for bit those of torch.utils.checkpoint, first order and higher, as often as the
        graph is kept (retain_graph).
    Memory: on the device, in the backward, the inputs of the call that runs and of the one before.
    Raises: TypeError on a function or store of another type; ValueError with save_attention when
        the function calls no such attention; RuntimeError, in the backward, when an input was
        modified in place; HostMemoryError when the host has no room.
    Source: Chen et al. 2016, arXiv:1604.06174; docs/ops/offloaded_checkpoint.md.
    """
    if not callable(function):
        raise TypeError(f"function must be callable, got {check.describe(function)}")
    if not isinstance(store, HostStore | None):
        raise TypeError(f"store must be a HostStore, got {check.describe(store)}")
    # By name, so that no argument of the function passes for an option of torch's checkpoint.
    function = partial(function, **kwargs) if kwargs else function
    if not torch.is_grad_enabled():
        return function(*args)
    segment = _Segment(store or _default_store(), args)
    options = {"context_fn": segment.attention_contexts} if save_attention else {}
    # The function saves what it saves under checkpoint's own hooks: these see its inputs alone.
    with saved_tensors_hooks(segment.pack, segment.unpack):
        result = checkpoint(function, *args, use_reentrant=False, **options)
    if save_attention and not segment.attention:
        raise ValueError(
            "save_attention=True, and the function called no attention of r1kernels: give the "
            'model attn_implementation="r1kernels" (r1kernels.register_attention), or pass False'
        )
    return result


class _Segment:
    """What one checkpointed call keeps in a store, as long as the call's graph needs it."""

    def __init__(self, store: HostStore, args: tuple):
        self.store = store
        self.inputs: list[Handle] = []
        self.attention: list[tuple[Handle, Handle]] = []
        # Checkpoint may save more than the arguments, and it saves aliases of them.
        self._given = {
            x.untyped_storage().data_ptr()
            for x in args
            if type(x) is Tensor and x.is_floating_point() and not (x.is_leaf and x.requires_grad)
        } - {0}
        self._previous = _latest.get(store, lambda: None)
        _latest[store] = weakref.ref(self)

    def pack(self, tensor: Tensor) -> Handle:
        if type(tensor) in PLAIN and tensor.untyped_storage().data_ptr() not in self._given:
            return Handle(tensor)
        self.inputs.append(self.store.put(tensor, more=bool(self.inputs)))
        return self.inputs[-1]

    def unpack(self, handle: Handle) -> Tensor:
        tensor = handle.take()
        for own in self._attention_handles():
            own.prefetch()
        if (previous := self._previous()) is not None:
            for other in (*previous.inputs, *previous._attention_handles()):
                other.prefetch()
        return tensor

    def attention_contexts(self) -> tuple[Remembering, Remembering]:
        return Remembering(lambda: self._record), Remembering(self._replay)

    def _record(self, compute: Callable[[], OutputAndLse]) -> OutputAndLse:
        output, lse = compute()
        # With the inputs, if there are any: waiting for their copy here would hold up the layer.
        handles = tuple(self.store.put(x, more=True) for x in (output, lse))
        self.attention.append(handles)
        return output, lse

    def _replay(self) -> Callable[[Callable[[], OutputAndLse]], OutputAndLse]:
        saved = iter(self.attention)

        def replay(_: Callable[[], OutputAndLse]) -> OutputAndLse:
            handles = next(saved, None)
            if handles is None:
                raise RuntimeError(
                    f"the function calls attention more than the {len(self.attention)} times of "
                    "its first pass: it does not do the same when it is run again"
                )
            # Aliases: a caller may make them part of a graph.
            output, lse = (handle.take().detach() for handle in handles)
            return output, lse

        return replay

    def _attention_handles(self) -> Iterator[Handle]:
        return (handle for pair in self.attention for handle in pair)


# The latest segment of each store: the one whose inputs are needed next when it comes to its turn.
_latest: weakref.WeakKeyDictionary[HostStore, Callable[[], _Segment | None]] = (
    weakref.WeakKeyDictionary()
)


@cache
def _default_store() -> HostStore:
    return HostStore()


class CheckpointedLayers:
    """What `checkpoint_layers` changed, and `undo()`; a context manager that undoes it at its end.

    Attributes:
        names: the modules that are checkpointed, by their names in the model.
        store: where their inputs wait.
    """

    def __init__(self, model: torch.nn.Module, store: HostStore):
        self.store = store
        self._before = [
            (name, module, {key: vars(module)[key] for key in HOOKS if key in vars(module)})
            for name, module in model.named_modules()
            if hasattr(module, "gradient_checkpointing")
        ]
        flagged = [name for name, *_ in self._before]
        # A decoder has the flag too, and leaves the work to its layers.
        self.names = [
            name
            for name in flagged
            if not any(other.startswith(f"{name}.") or not name for other in flagged if other)
        ]

    def undo(self) -> None:
        """Put the model's own settings back, and unpin the memory unless a graph still needs it."""
        for _, module, before in self._before:
            for key in HOOKS:
                vars(module).pop(key, None)
            vars(module).update(before)
        self._before = []
        if not self.store.usage().host:
            self.store.release()

    def __enter__(self) -> "CheckpointedLayers":
        return self

    def __exit__(self, *exc: object) -> None:
        self.undo()


HOOKS = ("gradient_checkpointing", "_gradient_checkpointing_func")


def checkpoint_layers(
    model: torch.nn.Module, *, device_bytes: int = 0, save_attention: bool = False
) -> CheckpointedLayers:
    """Run the layers of a transformers model under `offloaded_checkpoint`, all with one store.

    It takes the place of `model.gradient_checkpointing_enable()`, and uses the same hook. As there,
    layers are checkpointed in training mode alone (model.train()).

    Args:
        model: a PreTrainedModel of transformers, or a PEFT model around one.
        device_bytes: bytes of layer inputs that may stay on the GPU, the last layers' first.
        save_attention: attention is not computed again; needs attn_implementation="r1kernels".

    Returns:
        CheckpointedLayers: `.undo()`, or `with checkpoint_layers(model): ...`.

    Raises: ValueError when the model has no such hook, is a wrapper around the model (pass
        model.module), or is under checkpoint_layers already.
    """
    name = type(model).__name__
    enable = getattr(model, "_set_gradient_checkpointing", None)
    if enable is None or not getattr(model, "supports_gradient_checkpointing", False):
        raise ValueError(
            f"{name} has no gradient checkpointing of transformers to plug into: pass a "
            "PreTrainedModel (without a wrapper around it), or call offloaded_checkpoint yourself"
        )
    for module in model.modules():
        hook = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(hook, "func", None) is offloaded_checkpoint:
            raise ValueError(f"{name} is under checkpoint_layers already: undo that first")
    done = CheckpointedLayers(model, HostStore(device_bytes))
    if not done.names:
        raise ValueError(f"{name} has no layer with a gradient_checkpointing flag")
    hook = partial(offloaded_checkpoint, store=done.store, save_attention=save_attention)
    enable(enable=True, gradient_checkpointing_func=hook)
    return done
