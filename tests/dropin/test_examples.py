import importlib.util
import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
# example -> the library it runs on, and figures that its two runs must share
NEEDS = {
    "liger_loss": ("liger_kernel", r"loss (\S+), clipped (\S+),"),
    "openrlhf_actor": (None, r"mean logp (\S+), \|dlogits\| (\S+),"),
    "prime_rl_head": (None, r"entropy (\S+), \|dweight\| (\S+),"),
    "transformers_logp": ("transformers", None),
    "trl_grpo": ("trl", r"(\S+) \((\S+)\)"),
    "verl_actor": (None, r"loss (\S+), \|dweight\| (\S+),"),
}


def test_every_example_is_listed_and_short():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(NEEDS)
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 40, path.name


@pytest.mark.parametrize("name", NEEDS)
def test_example(name, capsys, monkeypatch, tmp_path):
    library, pattern = NEEDS[name]
    if library and importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    monkeypatch.chdir(tmp_path)
    if not library:
        # A stand-in must not stay behind as if the library were there.
        monkeypatch.setattr("sys.modules", dict(__import__("sys").modules))
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name=f"example_{name}")
    lines = [x for x in capsys.readouterr().out.splitlines() if not x.startswith("{")]
    if pattern is None:
        differences = [
            float(x) for x in re.findall(r"(?:probabilities|dweight) (\S+?),?(?:$| )", lines[-1])
        ]
        assert len(differences) == 2 and max(differences) < 1e-5
        return
    plain, patched = (
        [float(x) for pair in re.findall(pattern, line) for x in pair]
        for line in lines
        if re.search(pattern, line)
    )
    assert plain and any(plain) and patched == pytest.approx(plain, rel=1e-4, abs=2e-6)
