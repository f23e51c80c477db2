import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

SMOKE = """
import sys
import torch, r1kernels
from r1kernels import backend, token_logp
logits = torch.tensor([[1.0, 2.0, 0.5]])
logp = token_logp(logits, torch.tensor([1])).logp
assert torch.allclose(logp, torch.log_softmax(logits, -1)[:, 1]), logp
print(r1kernels.__file__)
print(backend.implementation("token_logp", "cpu", logits).__name__)
print(sorted({"triton", "transformers", "vllm", "numpy"} & set(sys.modules)))
"""


def run(*command: str | Path, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    result = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def requirements(name: str) -> set[str]:
    """The distribution and everything it needs here, extras left out."""
    found, pending = set(), [name]
    while pending:
        name = re.sub(r"[-_.]+", "-", pending.pop()).lower()
        if name in found:
            continue
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
        pending += [re.match(r"[\w.-]+", need)[0] for need in needs if "extra ==" not in need]
    return found


@pytest.fixture(scope="module")
def torch_alone(tmp_path_factory) -> Path:
    """A folder with links to torch and its requirements, and nothing else of this environment."""
    folder = tmp_path_factory.mktemp("torch")
    for name in requirements("torch") - {"triton"}:
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or [] if file.parts[0] != ".."}:
            if top != "__pycache__" and not (folder / top).exists():
                (folder / top).symlink_to(distribution.locate_file(top))
    return folder


@pytest.fixture(scope="module")
def no_torch(tmp_path_factory) -> dict[str, str]:
    """An environment for builds in which importing torch fails."""
    folder = tmp_path_factory.mktemp("no_torch")
    (folder / "torch.py").write_text("raise ImportError('the build imported torch')\n")
    return {"PYTHONPATH": str(folder)}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory, no_torch) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", folder]
    run(*build, ROOT, env=no_torch)
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def source_tree(sdist, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder)
    return next(folder.iterdir())


def build_wheel(source: Path, folder: Path, env: dict[str, str]) -> tuple[Path, str]:
    build = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", folder]
    output = run(*build, source, env=env)
    return next(folder.glob("*.whl")), output


def install(wheel: Path, torch_alone: Path, folder: Path) -> Path:
    """The Python of a new environment that holds the wheel and sees torch."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    run(
        sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel
    )
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "torch_alone.pth").write_text(f"{torch_alone}\n")
    return python


def smoke(python: Path, cwd: Path) -> list[str]:
    """What SMOKE prints: where r1kernels lies, the implementation that ran, what it imported."""
    env = {name: value for name, value in os.environ.items() if name != "R1KERNELS_BACKEND"}
    # By itself: what libraries say on stderr may come at any place in between.
    result = subprocess.run(
        [python, "-I", "-c", SMOKE], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert Path(lines[0]).is_relative_to(python.parent.parent), f"imported from elsewhere: {lines}"
    assert "token_logp" in run(python, "-I", "-m", "r1kernels", cwd=cwd)
    assert "usage" in run(python.parent / "r1", "--help", cwd=cwd).lower()
    return lines


def test_sdist_holds_what_a_build_needs_and_nothing_built(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    tracked = run("git", "ls-files", "csrc", "r1kernels", "r1", "recipes", "requirements", cwd=ROOT)
    assert sorted(set(tracked.split()) - names) == []
    assert {"LICENSE", "README.md", "setup.py", "pyproject.toml"} <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]


def test_wheel_with_the_extension(source_tree, no_torch, torch_alone, tmp_path):
    wheel, _ = build_wheel(source_tree, tmp_path, {**no_torch, "NVCC": "none"})
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert any(re.fullmatch(r"r1kernels/_C\..*\.so", name) for name in names)
    tracked = run("git", "ls-files", "r1kernels", "r1", cwd=ROOT).split()
    assert sorted(set(tracked) - set(names)) == []
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "csrc"))]
    python = install(wheel, torch_alone, tmp_path / "venv")
    _, implementation, imported = smoke(python, tmp_path)
    assert implementation == "r1kernels._native.token_logp"
    assert not set(ast.literal_eval(imported)) - {"numpy"}


def test_wheel_without_a_compiler_is_pure(source_tree, no_torch, torch_alone, tmp_path):
    env = {**no_torch, "CC": "no-such-compiler", "CXX": "no-such-compiler"}
    wheel, output = build_wheel(source_tree, tmp_path, env)
    assert "no no-such-compiler" in output and "without its native backend" in output
    assert wheel.name.endswith("-py3-none-any.whl")
    python = install(wheel, torch_alone, tmp_path / "venv")
    _, implementation, _ = smoke(python, tmp_path)
    assert implementation == "r1kernels.reference.token_logp"


def test_a_source_that_does_not_compile_fails_the_build(source_tree, no_torch, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        (broken / name).write_bytes((source_tree / name).read_bytes())
    (broken / "csrc").mkdir()
    (broken / "csrc" / "bindings.cpp").write_text("#error broken on purpose\n")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    result = subprocess.run(command, cwd=broken, capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    assert "r1kernels._C did not compile; CXX=none installs without it" in result.stderr


def test_versions_agree():
    tree = ast.parse((ROOT / "r1kernels" / "__init__.py").read_text())
    values = {
        node.targets[0].id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    }
    assert values["__version__"] == PROJECT["version"]


def test_the_base_install_needs_torch_alone():
    assert [re.match(r"\w+", need)[0] for need in PROJECT["dependencies"]] == ["torch"]
    extras = {"train", "vllm", "flash", "liger", "bench", "dev"}
    assert set(PROJECT["optional-dependencies"]) == extras


@pytest.mark.parametrize("machine", ["cpu", "gpu"])
def test_lock_pins_every_package_once_and_covers_the_extras(machine):
    lines = (ROOT / "requirements" / f"{machine}.lock").read_text().splitlines()
    pins = [line.split("==") for line in lines if not line.startswith("#")]
    assert all(len(pin) == 2 for pin in pins)
    names = [re.sub(r"[-_.]+", "-", name).lower() for name, _ in pins]
    assert len(names) == len(set(names))
    for extra in ("train", "liger", "bench", "dev"):
        for need in PROJECT["optional-dependencies"][extra]:
            assert re.match(r"[\w-]+", need)[0].lower() in names, f"{need} of {extra}"


def test_cpu_lock_has_the_cpu_build_of_torch_and_nothing_built_for_cuda():
    lock = (ROOT / "requirements" / "cpu.lock").read_text()
    assert re.search(r"^torch==[\d.]+\+cpu$", lock, re.M)
    assert not re.search(r"^(torchvision|torchaudio|torchcodec|nvidia|cuda|vllm==)", lock, re.M)
