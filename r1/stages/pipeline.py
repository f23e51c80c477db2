"""A chain of stages, each in its own run directory `<name>-<stage>`; finished ones are skipped."""

from dataclasses import replace
from pathlib import Path

from r1 import config as settings
from r1 import rundir, schema, stages
from r1.config import Config, PipelineStage
from r1.stages import Result


def run(config: Config, *, restart: bool = False) -> list[Result]:
    """Run the stages of `config.pipeline` in order; a stage starts from the model of the last one
    that made one.

    Raises: ValueError when there are none, or two have the same name.
    """
    names = [stage.name or stage.stage for stage in config.pipeline]
    if not names:
        raise ValueError("the recipe has no [[pipeline]] stages, so there is nothing to run")
    if len(set(names)) < len(names):
        raise ValueError(f"pipeline stages must have different names, got {', '.join(names)}")
    for name, stage in zip(names, config.pipeline, strict=True):
        # a mistake in the last stage's settings should not wait for the first ones
        stage_config(config, stage, name, None)
    results: list[Result] = []
    model: Path | None = None
    for number, (name, stage) in enumerate(zip(names, config.pipeline, strict=True), 1):
        own = stage_config(config, stage, name, model)
        print(f"=== stage {number}/{len(names)}: {name} in {own.run.path}", flush=True)
        result = None if restart else finished(own, stage.stage)
        result = result or stages.run(stage.stage, own, restart=restart)
        results.append(result)
        model = result.model or model
    return results


def stage_config(config: Config, stage: PipelineStage, name: str, model: Path | None) -> Config:
    """The recipe's settings with the stage's overrides and the model it starts from."""
    raw = settings.to_dict(config)
    for text in stage.overrides:
        schema.set_override(Config, raw, text)
    own = settings.from_dict(raw, f"the overrides of pipeline stage {name!r}")
    changes = {"run": replace(own.run, name=f"{config.run.name}-{name}")}
    if model is not None:
        changes["model"] = replace(own.model, path=str(model))
    return replace(own, **changes)


def finished(config: Config, stage: str) -> Result | None:
    """The result of a stage that is done already, with these settings; None when it is not."""
    folder = config.run.path
    done = rundir.read_done(folder)
    model = folder / done["model"] if done and done["model"] else None
    if done is None or (model is not None and not model.is_dir()):
        return None
    with rundir.opened(config, stage):
        print(f"done already: {folder} at step {done['step']}")
        return Result(stage, folder, done["step"], model, done["metrics"])
