import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from r1 import config, schema

REQUIRED = ["run.name=x", "model.path=toy"]


def load(*overrides, path=None):
    return config.load(path, [*REQUIRED, *overrides])


@pytest.mark.parametrize(
    "override, section, expected",
    [
        ("rl.group_size=8", "rl.group_size", 8),
        ("rl.optim.lr=3e-4", "rl.optim.lr", 3e-4),
        ("rl.optim.lr=1", "rl.optim.lr", 1.0),
        ("run.tensorboard=false", "run.tensorboard", False),
        ("run.dir=/a b=c", "run.dir", "/a b=c"),
        ('run.dir="quoted"', "run.dir", "quoted"),
        ("rl.minibatch_size=64", "rl.minibatch_size", 64),
        ("rl.minibatch_size=none", "rl.minibatch_size", None),
        ("eval.pass_at=1,2", "eval.pass_at", (1, 2)),
        ("eval.pass_at=[4]", "eval.pass_at", (4,)),
        ("rl.optim.betas=0.5,0.25", "rl.optim.betas", (0.5, 0.25)),
        ("rl.rewards.accuracy=2", "rl.rewards", {"accuracy": 2.0, "format": 0.3}),
        ("rl.rewards={accuracy=2}", "rl.rewards", {"accuracy": 2.0}),
        ("task.params.min_terms=2", "task.params", {"min_terms": 2}),
        ("task.params.style=plain", "task.params", {"style": "plain"}),
        ("rl.objective.clip_high=0.28", "rl.objective.overrides", {"clip_high": 0.28}),
    ],
)
def test_override(override, section, expected):
    value = load(override)
    for part in section.split("."):
        value = getattr(value, part)
    assert value == expected and type(value) is type(expected)


def test_a_partial_section_keeps_the_other_defaults():
    changed = load("base.optim.lr=0.1").base.optim
    assert changed == dataclasses.replace(load().base.optim, lr=0.1)


def test_overrides_win_over_the_file(tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[rl]\nsteps = 3\ngroup_size = 4\n[[pipeline]]\nstage = "base"\n')
    loaded = load("rl.steps=5", path=recipe)
    assert (loaded.rl.steps, loaded.rl.group_size) == (5, 4)
    assert loaded.pipeline == (config.PipelineStage(stage="base"),)


@pytest.mark.parametrize(
    "override, words",
    [
        ("rl.group_siz=8", ["'rl.group_siz'", "override", "'rl.group_size'"]),
        ("group_size=8", ["'group_size'", "'rl.group_size'"]),
        ("rl.optm.lr=1", ["'rl.optm'", "'rl.optim'"]),
        ("rl.group_size=x", ["rl.group_size", "int", "'x'"]),
        ("rl.group_size=1", ["rl.group_size", "at least 2"]),
        ("rl.group_size=2.5", ["rl.group_size", "int"]),
        ("rl.optim.lr=nan", ["rl.optim.lr", "finite"]),
        ("rl.optim.betas=0.9", ["rl.optim.betas", "2 items"]),
        ("run.tensorboard=1", ["run.tensorboard", "bool"]),
        ("rollout.engine=vlm", ["rollout.engine", "'vllm'"]),
        ("model.toy.heads=5", ["model.toy.heads", "96", "5"]),
        ("rl=3", ["'rl'", "table"]),
        ("rl.group_size", ["section.key=value"]),
        ("run.name.x=3", ["'run.name'"]),
        ("run.name=a/b", ["run.name", "'a/b'"]),
        ('pipeline=[{stag="rl"}]', ["pipeline[0].stag", "pipeline[0].stage"]),
        ("model.gradient_checkpointing=true", ["it is 'long.mode' now", "true is 'checkpoint'"]),
        ("long.mode=fast", ["long.mode", "'stream'"]),
        ("long.chunk_size=0", ["long.chunk_size", "at least 1"]),
    ],
)
def test_mistakes_name_the_key_and_its_origin(override, words):
    with pytest.raises(ValueError) as caught:
        load(override)
    for word in [*words, override]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "overrides, normalize",
    [
        ([], "std"),
        (["rl.objective.preset=dr_grpo"], "mean"),
        (["rl.objective.preset=kimi"], "mean"),
        (["rl.objective.preset=rloo"], "leave_one_out"),
        (["rl.objective.preset=dr_grpo", "rl.advantage=std"], "std"),
    ],
)
def test_advantages_follow_the_objective_unless_told_otherwise(overrides, normalize):
    assert load(*overrides).rl.normalize == normalize


def test_a_jsonl_task_needs_a_path():
    with pytest.raises(ValueError, match=r"task\.path must name a file.*the defaults"):
        load("task.name=jsonl")


def test_mistakes_in_a_file_name_the_file(tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[rl]\ngroup_sise = 8\n")
    with pytest.raises(ValueError, match=r"rl\.group_sise.*recipe\.toml.*rl\.group_size"):
        load(path=recipe)
    recipe.write_text('[rl]\nsteps = "many"\n')
    with pytest.raises(ValueError, match=r"rl\.steps.*recipe\.toml.*expected int"):
        load(path=recipe)
    recipe.write_text("[rl\n")
    with pytest.raises(ValueError, match=r"recipe\.toml is not valid TOML"):
        load(path=recipe)


@pytest.mark.parametrize("missing", ["run.name", "model.path"])
def test_missing_required_key(missing):
    with pytest.raises(ValueError, match=rf"missing required key '{missing}'"):
        config.load(None, [text for text in REQUIRED if not text.startswith(missing)])


def test_dumps_round_trips():
    loaded = load("rl.minibatch_size=8", 'pipeline=[{stage="rl",overrides=["rl.steps=3"]}]')
    assert config.from_dict(json.loads(config.dumps(loaded))) == loaded


def test_every_field_has_a_docstring():
    import ast

    for module in ("config.py", "config_training.py"):
        tree = ast.parse((Path(config.__file__).parent / module).read_text())
        for node in (n for n in ast.walk(tree) if isinstance(n, ast.ClassDef)):
            fields = [n.target.id for n in node.body if isinstance(n, ast.AnnAssign)]
            followed = {
                first.target.id
                for first, then in zip(node.body, node.body[1:], strict=False)
                if isinstance(first, ast.AnnAssign) and isinstance(then, ast.Expr)
            }
            sections = {"run", "model", "long", "task", "chat", "rollout", "base", "rl", "eval"}
            exempt = sections if node.name == "Config" else set()
            assert set(fields) - followed <= exempt, node.name


def test_schema_reads_any_dataclass():
    @dataclasses.dataclass(frozen=True)
    class Leaf:
        pair: tuple[int, str] = (1, "a")
        either: int | str | None = None

    built = schema.build(Leaf, {"pair": [2, "b"], "either": "x"})
    assert built == Leaf((2, "b"), "x")
    assert schema.build(Leaf, {"either": 3}).either == 3
    with pytest.raises(ValueError, match="either"):
        schema.build(Leaf, {"either": 1.5})


def test_config_needs_the_standard_library_only():
    code = (
        "import sys; from r1 import config, types; "
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
