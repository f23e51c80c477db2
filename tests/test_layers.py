import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A package's parts, lowest layer first: a part imports its own layer and those before it.
LAYERS = {
    "r1kernels": [
        "check backend model_shape pinned_pool saved_attention",
        "weight_grads host_store",
        "projection",
        "objective packing rows reference sampling policy_inputs policy_terms padded_chunk",
        "attention_kernels shared_prefixes",
        "attention_parts",
        "shards head_contract balance memory_events",
        "chunked_head",
        "_native _triton _cuda",
        "head_inputs forward_gradients linear_logp_ops linear_policy_loss_ops kept_logp",
        "token_logp linear_logp policy_loss linear_policy_loss linear_loss advantages",
        "varlen_attention prefix_attention offloaded_checkpoint",
        "dropin attention_interface",
        "tiled_mlp",
        "tile_mlps decoder",
        "decoder_parts",
        "layer_chunks",
        "stream_layer",
        "stream_model",
        "patch memory memory_step",
        "__init__ __main__",
    ],
    "r1": [
        "__init__ types schema config config_training rundir",
        "chat data rewards plots",
        "tasks toy attention folders kernels",
        "model optim rollout batch evaluate long",
        "loss metrics checkpoint",
        "trainer report grade",
        "stages",
        "cli __main__",
    ],
}
LAYER_OF = {
    f"{package}.{part}": level
    for package, layers in LAYERS.items()
    for level, parts in enumerate(layers)
    for part in parts.split()
}
EXTENSIONS = {"r1kernels._C": "r1kernels._native", "r1kernels._C_cuda": "r1kernels._cuda"}
IMPLEMENTATIONS = ("r1kernels._native", "r1kernels._triton", "r1kernels._cuda")
WITHOUT_TORCH = {
    "chat",
    "config",
    "config_training",
    "data",
    "plots",
    "rewards",
    "schema",
    "tasks",
    "types",
}
ONLY_INSIDE_FUNCTIONS = {
    "flash_attn",
    "liger_kernel",
    "matplotlib",
    "reasoning_gym",
    "tensorboard",
    "transformers",
    "triton",
    "trl",
    "verl",
    "vllm",
}


def modules() -> dict[str, Path]:
    paths = [path for package in LAYERS for path in (ROOT / package).rglob("*.py")]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in paths}


def imports(path: Path) -> set[str]:
    """What a module imports when it is itself imported, as names of modules."""
    found, pending = set(), list(ast.parse(path.read_text()).body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                known = name in EXTENSIONS or name in MODULES or f"{name}.__init__" in MODULES
                found.add(name if known else node.module)
        elif isinstance(node, (ast.If, ast.Try, ast.With)):
            if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
                pending += ast.iter_child_nodes(node)
        elif isinstance(node, ast.ClassDef):
            pending += node.body
    return found


MODULES = modules()
IMPORTS = {module: imports(path) for module, path in MODULES.items()}
INTERNAL = [
    (module, name)
    for module, names in IMPORTS.items()
    for name in sorted(names - set(EXTENSIONS))
    if name.split(".")[0] in LAYERS
]


def part(module: str) -> str:
    names = module.split(".")
    return ".".join(names[:2]) if len(names) > 1 else f"{module}.__init__"


def test_every_module_has_a_layer():
    assert not {part(module) for module in MODULES} - set(LAYER_OF)


def test_imports_point_downwards():
    upwards = [
        f"{module} imports {name}"
        for module, name in INTERNAL
        if module.split(".")[0] == name.split(".")[0]
        and LAYER_OF.get(part(name), 0) > LAYER_OF.get(part(module), 0)
    ]
    assert not upwards


def test_no_import_cycle():
    graph = {module: set() for module in MODULES}
    for module, name in INTERNAL:
        graph[module].add(name if name in MODULES else f"{name}.__init__")
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def test_kernels_do_not_know_the_driver_and_implementations_stay_private():
    for module, name in INTERNAL:
        if module.startswith("r1kernels."):
            assert name.split(".")[0] == "r1kernels", f"{module} imports {name}"
        if part(name) in IMPLEMENTATIONS:
            # cuda replaces one GEMM of triton's head and shares the rest.
            shares = (part(module), part(name)) == ("r1kernels._cuda", "r1kernels._triton")
            assert part(module) == part(name) or shares, f"{module} imports {name}"


def test_only_its_own_implementation_touches_an_extension():
    for module, names in IMPORTS.items():
        for extension in names & set(EXTENSIONS):
            assert part(module) == EXTENSIONS[extension], f"{module} imports {extension}"


@pytest.mark.parametrize("module", sorted(IMPORTS))
def test_third_party_imports(module):
    outside = {name.split(".")[0] for name in IMPORTS[module]} - set(sys.stdlib_module_names)
    outside -= set(LAYERS)
    if module.startswith("r1kernels."):
        assert outside <= (
            {"torch", "triton"} if part(module) == "r1kernels._triton" else {"torch"}
        )
    else:
        assert not outside & ONLY_INSIDE_FUNCTIONS
        assert "torch" not in outside or part(module).split(".")[1] not in WITHOUT_TORCH


def import_without(blocked: set[str], statement: str) -> None:
    program = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Refuse())
{statement}
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr


def test_kernels_import_with_torch_alone():
    import_without({"r1", "triton", "transformers", "vllm", "trl", "verl"}, "import r1kernels")


def test_configuration_and_types_import_without_torch():
    import_without({"torch", "r1kernels", "transformers"}, "import r1.config, r1.types")
