"""Tests skip what they do not find; in the environment of `make setup` they find it all."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest

STAMP = Path(sys.prefix) / "setup.json"
made = pytest.mark.skipif(not STAMP.exists(), reason="the environment is not that of `make setup`")


@made
@pytest.mark.parametrize(
    "library",
    ["liger_kernel", "reasoning_gym", "tensorboard", "transformers", "triton", "trl", "vllm"],
)
def test_what_other_tests_skip_without_is_there(library):
    assert importlib.util.find_spec(library) is not None


@made
@pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
def test_the_extension_is_built():
    assert json.loads(STAMP.read_text())["native"]
    assert importlib.util.find_spec("r1kernels._C") is not None
