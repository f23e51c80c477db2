"""`make setup`: .venv from a lock file, the package in it with its extension built, both tried.

.venv/setup.json says what the environment holds and is written only after a step has been checked.
An environment without it was interrupted and is made again; one that matches is left alone.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "setup.json"
LOG = VENV / "setup.log"
TORCH_CPU_INDEX = os.environ.get("TORCH_CPU_INDEX", "https://download.pytorch.org/whl/cpu")
ENVIRON = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}

CHECK_ENVIRONMENT = (
    "import torch, vllm; from transformers import Qwen2ForCausalLM; print(torch.__version__)"
)
CHECK_PACKAGE = """
import importlib.util, torch, r1, r1kernels
native = importlib.util.find_spec("r1kernels._C") is not None
if native:
    import r1kernels._C
print(native)
"""


def main() -> None:
    started = time.monotonic()
    with exclusive():
        lock = ROOT / "requirements" / f"{os.environ.get('LOCK') or machine()}.lock"
        if not lock.exists():
            fail(f"no lock file {lock}; LOCK is cpu or gpu")
        environment = digest([lock], str(ROOT), str(sys.version_info[:2]))
        sources = [f for f in (ROOT / "csrc").rglob("*") if f.is_file()]
        compiler = shutil.which(os.environ.get("CXX") or "c++")
        package = digest([ROOT / "pyproject.toml", ROOT / "setup.py", *sources], str(compiler))
        stamp = read_stamp()
        if stamp.get("environment") != environment or not works():
            create_environment(lock)
            stamp = {"environment": environment}
            write_stamp(stamp)
        if stamp.get("package") != package or stamp["native"] != has_extension():
            write_stamp({"environment": environment})
            native = install_package()
            write_stamp({"environment": environment, "package": package, "native": native})
            say(f"ready in {time.monotonic() - started:.0f} s")
        else:
            say(f".venv is up to date with {lock.relative_to(ROOT)}")


@contextlib.contextmanager
def exclusive() -> Iterator[None]:
    """One setup per checkout. pip inherits the lock: one that outlives a kill is waited for."""
    handle = os.open(ROOT / "requirements", os.O_RDONLY)
    os.set_inheritable(handle, True)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say("waiting for another setup of this checkout")
        fcntl.flock(handle, fcntl.LOCK_EX)
    yield
    os.close(handle)


def machine() -> str:
    return "gpu" if shutil.which("nvidia-smi") or Path("/dev/nvidia0").exists() else "cpu"


def create_environment(lock: Path) -> None:
    if lock.stem == "cpu":
        try:
            ctypes.CDLL("libnuma.so.1")
        except OSError:
            fail("libnuma.so.1 is missing; vLLM needs it on a CPU (Debian and Ubuntu: libnuma1)")
    if VENV.exists():
        say(".venv is incomplete or out of date: making it again")
        shutil.rmtree(VENV)
    say(f"creating .venv with Python {sys.version.split()[0]} from {lock.relative_to(ROOT)}")
    run([getattr(sys, "_base_executable", sys.executable), "-m", "venv", str(VENV)])
    say(f"installing its packages takes a few minutes; pip's output is in {LOG.relative_to(ROOT)}")
    pins = [line for line in lock.read_text().splitlines() if line and not line.startswith("#")]
    torch = next(pin for pin in pins if pin.startswith("torch=="))
    if torch.endswith("+cpu") and not pip([torch], 1, required=False):
        say(f"pip's sources have no {torch}: taking it from {TORCH_CPU_INDEX}")
        pip(["--index-url", TORCH_CPU_INDEX, torch], 1)
    pip(["-r", str(lock)], len(pins))
    say("checking that torch, transformers and vllm import")
    say(f"torch {run([PYTHON, '-I', '-c', CHECK_ENVIRONMENT]).splitlines()[-1]}")


def install_package() -> bool:
    say("building and installing r1kernels and r1")
    pip(["--no-build-isolation", "--editable", str(ROOT)], 1)
    native = run([PYTHON, "-I", "-c", CHECK_PACKAGE]).splitlines()[-1] == "True"
    if not native:
        say("WARNING: no C++ compiler found, so the native CPU backend was not built")
    return native


def pip(arguments: list[str], packages: int, required: bool = True) -> bool:
    """`pip install` with a count of packages for its output, which goes to .venv/setup.log."""
    command = [PYTHON, "-m", "pip", "install", "--no-deps", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", *arguments]
    lines, seen, last = [], 0, ""
    with LOG.open("a") as log:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=ENVIRON,
            close_fds=False,
        )
        for line in process.stdout:
            log.write(line)
            lines.append(line)
            words = line.split()
            if words[:1] in (["Collecting"], ["Processing"], ["Obtaining"], ["Requirement"]):
                seen += 1
                last = f"fetching {seen}/{packages} {words[1].rsplit('/', 1)[-1]}"
            elif line.startswith(("Building", "Installing")):
                last = "building from source" if words[0] == "Building" else "unpacking"
            elif not line.startswith("Successfully"):
                continue
            progress(last)
    progress("")
    if process.wait() and required:
        errors = "".join([line for line in lines if "error" in line.lower()][:12])
        fail(f"pip install {' '.join(arguments)} failed; all of it is in {LOG}:\n{errors}")
    return process.returncode == 0


def run(command: list) -> str:
    result = subprocess.run(
        command, capture_output=True, text=True, env=ENVIRON, cwd="/", close_fds=False
    )
    if result.returncode:
        fail(f"{' '.join(map(str, command))} failed:\n{result.stdout}{result.stderr}")
    return result.stdout


def works() -> bool:
    return PYTHON.exists() and subprocess.run([PYTHON, "-c", ""], env=ENVIRON).returncode == 0


def has_extension() -> bool:
    return any((ROOT / "r1kernels").glob("_C.*.so"))


def digest(files: list[Path], *texts: str) -> str:
    parts = [
        file.relative_to(ROOT).as_posix().encode() + file.read_bytes() for file in sorted(files)
    ]
    parts += [text.encode() for text in texts]
    return hashlib.sha256(b"".join(hashlib.sha256(p).digest() for p in parts)).hexdigest()


def read_stamp() -> dict:
    try:
        return json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}


def write_stamp(stamp: dict) -> None:
    partial = STAMP.with_suffix(".tmp")
    partial.write_text(json.dumps(stamp, indent=1) + "\n")
    partial.replace(STAMP)


def progress(text: str) -> None:
    if sys.stdout.isatty():
        print(f"\r\033[K{text}", end="", flush=True)


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


def fail(text: str) -> None:
    sys.exit(f"setup: {text}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nsetup: interrupted; run it again to go on")
