"""`patch(name)`: this package's functions in place of another library's, and back."""

import inspect
import sys
import threading
import types
import warnings
from collections.abc import Callable

import torch

from r1kernels import dropin
from r1kernels.check import choice
from r1kernels.dropin.transformers import forward_with_logp

# library -> (module that defines the original, its name there), the name in r1kernels.dropin too
TARGETS = {
    "trl": (
        ("trl.kernels.chunked_logprob", "ChunkedLogProbFunction"),
        ("trl.trainer.utils", "add_fused_lm_head"),
        ("trl.trainer.utils", "entropy_from_logits"),
        ("trl.trainer.utils", "selective_log_softmax"),
        ("trl.trainer.utils", "selective_log_softmax_and_entropy"),
    ),
    "liger": (("liger_kernel.chunked_loss.grpo_loss", "LigerFusedLinearGRPOLoss"),),
    "verl": (
        ("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy"),
        ("verl.utils.experimental.torch_functional", "FusedLinearForPPO"),
        ("verl.utils.torch_functional", "logprobs_from_logits"),
    ),
    "openrlhf": (("openrlhf.models.utils", "log_probs_from_logits"),),
    "prime_rl": (("prime_rl.trainer.models.layers.lm_head", "FusedOutputLinear"),),
}
# Classes whose forward learns `return_logp=True`.
CAUSAL_LMS = {
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
NAMES = (*TARGETS, "transformers")

_lock = threading.RLock()
# library -> [(module or class, attribute, original, replacement)]
_rebound: dict[str, list[tuple[object, str, object, object]]] = {}


class Patched(list):
    """What a patch rebound, as "module.attribute"; a context manager that undoes it.

    A patch that was there before is left in place.
    """

    def __init__(self, name: str, places: list[str], new: bool):
        super().__init__(places)
        self.name, self.new = name, new

    def __enter__(self) -> "Patched":
        return self

    def __exit__(self, *exc: object) -> None:
        if self.new:
            unpatch(self.name)


def patch(name: str) -> Patched:
    """Put this package's functions in the place of a library's own.

    Every attribute of every imported module that is the original, whatever its name there, becomes
    the function of `r1kernels.dropin`. For "transformers" it is the `forward` of imported causal
    LMs (Gemma, Gemma 2 and 3, Llama, Mistral, Qwen 2 and 3), which then takes `return_logp=True`.

    A module imported later gets the new function when it imports it from where the old one is
    defined. Where that very module comes later, call `patch` again: it is idempotent and adds what
    is new. Instances made before keep their class.

    Args:
        name: "trl", "verl", "openrlhf", "liger", "prime_rl" or "transformers".

    Returns:
        The places, e.g. ["trl.trainer.utils._ChunkedLogProbFunction", ...], all that are rebound
        now; `with patch("trl"): ...` undoes it at the end.

    Raises: ValueError on another name; RuntimeError when the library is not imported, holds none of
        the functions, or has one with another signature (nothing is rebound then).
    """
    choice("name", name, NAMES)
    with _lock:
        done = _rebound.get(name, [])
        found = _causal_lms() if name == "transformers" else _originals(name)
        found = [(*place, original, new) for original, new, places in found for place in places]
        if not done and not found:
            raise RuntimeError(f"nothing to patch in {name}: import the part that you use first")
        for holder, attribute, _, replacement in found:
            setattr(holder, attribute, replacement)
        _rebound[name] = done + found
        places = [f"{_title(holder)}.{attribute}" for holder, attribute, *_ in _rebound[name]]
        return Patched(name, sorted(places), not done)


def unpatch(name: str) -> list[str]:
    """Put everything back as it was; the places. Nothing happens to a library not patched.

    A place that someone else has rebound since is left, with a warning. So is, in silence, a module
    outside the library that imported the replacement from it in between.
    """
    choice("name", name, NAMES)
    with _lock:
        places = []
        done = _rebound.pop(name, [])
        for original, replacement in {(id(o), id(r)): (o, r) for _, _, o, r in done}.values():
            # Modules of the library that came in between took the replacement from it.
            inside = {title.split(".")[0] for title, _ in TARGETS.get(name, ())}
            done += [
                (holder, attribute, original, replacement)
                for holder, attribute in _places(replacement)
                if holder.__name__.split(".")[0] in inside
                and not any(holder is h and attribute == a for h, a, *_ in done)
            ]
        for holder, attribute, original, replacement in done:
            title = f"{_title(holder)}.{attribute}"
            if vars(holder).get(attribute) is not replacement:
                warnings.warn(f"{title} was rebound by someone else and stays", stacklevel=2)
                continue
            setattr(holder, attribute, original)
            places.append(title)
        return sorted(places)


def _originals(name: str) -> list[tuple[object, object, list[tuple[object, str]]]]:
    """(original, replacement, where it stands) of a library's functions not yet replaced."""
    modules = [(sys.modules.get(title), title, attribute) for title, attribute in TARGETS[name]]
    if not any(module for module, *_ in modules):
        titles = ", ".join(dict.fromkeys(title for _, title, _ in modules))
        raise RuntimeError(f"{name} is not imported, or no part that matters ({titles})")
    found = []
    for module, title, attribute in modules:
        if module is None:
            continue
        replacement = getattr(dropin, attribute)
        original = getattr(module, attribute, None)
        if original is replacement:
            done = (o for _, _, o, r in _rebound.get(name, []) if r is replacement)
            original = next(done, replacement)
        if original is replacement:
            continue
        if original is None:
            raise RuntimeError(f"{title} has no {attribute}: this version of {name} is unknown")
        _check_signature(f"{title}.{attribute}", original, replacement)
        found.append((original, replacement, _places(original)))
    return found


def _causal_lms() -> list[tuple[object, object, list[tuple[object, str]]]]:
    if "transformers" not in sys.modules:
        raise RuntimeError("transformers is not imported: import it first")
    classes = [
        vars(module).get(title)
        for part, title in CAUSAL_LMS.items()
        if (module := sys.modules.get(f"transformers.models.{part}.modeling_{part}"))
    ]
    patched = [holder for holder, *_ in _rebound.get("transformers", [])]
    return [
        (cls.forward, forward_with_logp(cls.forward), [(cls, "forward")])
        for cls in classes
        if cls not in patched
    ]


def _places(value: object) -> list[tuple[object, str]]:
    """Every attribute of an imported module that is `value`; this package's own are none."""
    modules = {
        id(module): module
        for title, module in list(sys.modules.items())
        if title.split(".")[0] != "r1kernels" and isinstance(module, types.ModuleType)
    }
    return [
        (module, attribute)
        for module in modules.values()
        for attribute, x in list(vars(module).items())
        if x is value
    ]


def _title(holder: object) -> str:
    name = holder.__name__
    return f"{holder.__module__}.{name}" if isinstance(holder, type) else name


def _check_signature(title: str, original: object, replacement: object) -> None:
    """Raises: RuntimeError unless every call that the original takes means the same here."""
    theirs, ours = _signatures(original), _signatures(replacement)
    if len(theirs) != len(ours) or not all(map(_accepts, ours, theirs)):
        shown, mimicked = (
            " and ".join(f"({', '.join(map(str, parameters))})" for parameters in signatures)
            for signatures in (theirs, ours)
        )
        raise RuntimeError(
            f"{title} has the signature {shown}, and this package mimics {mimicked}: "
            "this version is unknown, nothing is patched"
        )


def _signatures(x: object) -> list[list[inspect.Parameter]]:
    """The parameters of a function, of an autograd function's apply, of a module's two methods."""

    def parameters(function: Callable, skip: int) -> list[inspect.Parameter]:
        return list(inspect.signature(function).parameters.values())[skip:]

    if isinstance(x, type) and issubclass(x, torch.nn.Module):
        return [parameters(x.__init__, 1), parameters(x.forward, 1)]
    # A library may keep the class, or its apply under another name.
    x = getattr(x, "__self__", x)
    if isinstance(x, type) and issubclass(x, torch.autograd.Function):
        return [parameters(x.forward, 1)]
    return [parameters(x.apply if isinstance(x, type) else x, 0)]


def _accepts(ours: list[inspect.Parameter], theirs: list[inspect.Parameter]) -> bool:
    def key(parameter: inspect.Parameter) -> tuple:
        return parameter.name, parameter.kind, parameter.default

    return [key(p) for p in ours[: len(theirs)]] == [key(p) for p in theirs] and all(
        p.default is not p.empty for p in ours[len(theirs) :]
    )
