import subprocess
import sys
import threading
import types

import pytest

import r1kernels
from r1kernels import dropin
from r1kernels.patch import CAUSAL_LMS, NAMES
from tests.dropin import stubs

PPO = "verl.utils.experimental.torch_functional"
LOGITS = "verl.utils.torch_functional"


@pytest.fixture
def verl(monkeypatch):
    """Stub modules of verl, and a module of someone else's that imported from one under a name."""
    modules = stubs.install(monkeypatch, "verl")
    user = types.ModuleType("somebody.loop")
    user.logprobs = stubs.logprobs_from_logits
    monkeypatch.setitem(sys.modules, "somebody.loop", user)
    yield types.SimpleNamespace(modules=modules, user=user, **vars(modules[PPO]))
    r1kernels.unpatch("verl")


def state(verl):
    return [dict(vars(module)) for module in (*verl.modules.values(), verl.user)]


def test_every_reference_is_rebound_and_put_back(verl):
    before = state(verl)
    places = r1kernels.patch("verl")
    assert set(places) >= {
        f"{PPO}.FusedLinearForPPO",
        f"{LOGITS}.logprobs_from_logits",
        "somebody.loop.logprobs",
        "verl.utils.kernel.linear_cross_entropy.linear_cross_entropy",
    }
    assert verl.user.logprobs is dropin.logprobs_from_logits
    assert r1kernels.unpatch("verl") == places
    assert state(verl) == before
    assert r1kernels.unpatch("verl") == []


def test_patching_twice_is_patching_once(verl):
    before = state(verl)
    with r1kernels.patch("verl") as outer:
        with r1kernels.patch("verl") as inner:
            assert inner == outer
        assert verl.user.logprobs is dropin.logprobs_from_logits
    assert state(verl) == before


def test_an_exception_inside_puts_everything_back(verl):
    before = state(verl)
    with pytest.raises(KeyError), r1kernels.patch("verl"):
        raise KeyError
    assert state(verl) == before


def test_modules_that_come_later(verl, monkeypatch):
    late = verl.modules.pop(LOGITS)
    monkeypatch.delitem(sys.modules, LOGITS)
    first = r1kernels.patch("verl")
    assert f"{LOGITS}.logprobs_from_logits" not in first
    # The defining module comes: a second call picks it up.
    monkeypatch.setitem(sys.modules, LOGITS, late)
    assert set(r1kernels.patch("verl")) > set(first)
    assert late.logprobs_from_logits is dropin.logprobs_from_logits
    # One that imports from it gets the new function by itself, and loses it with the others.
    newcomer = types.ModuleType("verl.workers.actor")
    newcomer.logprobs = late.logprobs_from_logits
    monkeypatch.setitem(sys.modules, "verl.workers.actor", newcomer)
    assert "verl.workers.actor.logprobs" in r1kernels.unpatch("verl")
    assert newcomer.logprobs is late.logprobs_from_logits is stubs.logprobs_from_logits


def test_another_signature_is_refused_and_nothing_is_rebound(verl):
    def logprobs_from_logits(logits, labels, inplace_backward=False):
        raise AssertionError

    verl.modules[LOGITS].logprobs_from_logits = logprobs_from_logits
    before = state(verl)
    with pytest.raises(RuntimeError, match=r"logprobs_from_logits.*inplace_backward=False"):
        r1kernels.patch("verl")
    assert state(verl) == before


def test_a_further_parameter_is_another_signature(verl):
    class FusedLinearForPPO(stubs.FusedLinearForPPO):
        def forward(self, hidden_states, vocab_weights, input_ids, temperature=1.0, mask=None):
            raise AssertionError

    verl.modules[PPO].FusedLinearForPPO = FusedLinearForPPO
    with pytest.raises(RuntimeError, match=r"FusedLinearForPPO.*mask=None"):
        r1kernels.patch("verl")


def test_another_kind_of_thing_is_another_signature(verl):
    verl.modules[PPO].FusedLinearForPPO = stubs.linear_cross_entropy
    with pytest.raises(RuntimeError, match="FusedLinearForPPO has the signature"):
        r1kernels.patch("verl")


def test_a_missing_function_is_an_unknown_version(verl):
    del verl.modules[PPO].FusedLinearForPPO
    with pytest.raises(RuntimeError, match="has no FusedLinearForPPO"):
        r1kernels.patch("verl")


def test_what_someone_else_rebound_stays(verl):
    r1kernels.patch("verl")
    verl.user.logprobs = "mine"
    with pytest.warns(UserWarning, match=r"somebody\.loop\.logprobs"):
        places = r1kernels.unpatch("verl")
    assert verl.user.logprobs == "mine" and "somebody.loop.logprobs" not in places
    assert verl.modules[LOGITS].logprobs_from_logits is stubs.logprobs_from_logits


def test_what_was_put_there_by_hand_is_left(verl):
    verl.modules[LOGITS].logprobs_from_logits = dropin.logprobs_from_logits
    places = r1kernels.patch("verl")
    assert f"{LOGITS}.logprobs_from_logits" not in places
    assert verl.user.logprobs is stubs.logprobs_from_logits


def test_threads(verl):
    before, failures = state(verl), []

    def work():
        try:
            for _ in range(3):
                with r1kernels.patch("verl"):
                    pass
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    r1kernels.unpatch("verl")
    assert not failures and state(verl) == before


def test_names():
    assert set(NAMES) == {"trl", "liger", "verl", "openrlhf", "prime_rl", "transformers"}
    for function in (r1kernels.patch, r1kernels.unpatch):
        with pytest.raises(ValueError, match="'deepspeed'"):
            function("deepspeed")


def test_models_that_are_not_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", types.ModuleType("transformers"))
    for part in CAUSAL_LMS:
        monkeypatch.delitem(sys.modules, f"transformers.models.{part}.modeling_{part}", False)
    with pytest.raises(RuntimeError, match="nothing to patch in transformers"):
        r1kernels.patch("transformers")


def test_it_imports_no_library():
    program = """
import sys, r1kernels
from r1kernels.patch import NAMES
for name in NAMES:
    try:
        r1kernels.patch(name)
    except RuntimeError as error:
        assert f"{name} is not imported" in str(error), error
    else:
        raise AssertionError(name)
loaded = {module.split(".")[0] for module in sys.modules}
print(loaded & {"trl", "liger_kernel", "verl", "openrlhf", "prime_rl", "transformers"})
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "set()"
