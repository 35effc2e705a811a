"""The files of a run, written atomically: metrics and checkpoints."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


class UserError(Exception):
    """An error that the user can fix; the text is one sentence that says how."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file that then replaces path, so path is never incomplete."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    yield unfinished
    os.replace(unfinished, path)


def write_metrics(path: Path, history: list[dict[str, float]]) -> None:
    """Write a line of JSON for each step."""
    with replacing(path) as unfinished:
        unfinished.write_text("".join(json.dumps(line) + "\n" for line in history))


def read_metrics(path: Path, steps: int) -> list[dict[str, float]]:
    """Return the metrics of the first steps of a run."""
    if not steps:
        return []
    try:
        history = [json.loads(line) for line in path.read_text().splitlines()[:steps]]
        if [line["step"] for line in history] != list(range(1, steps + 1)):
            raise ValueError("steps are missing")
        if any(line.keys() != history[0].keys() for line in history) or "loss" not in history[0]:
            raise ValueError("the steps have different metrics")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path} must have the metrics of the first {steps} steps, but can't be read "
            f"({error}): remove {path.parent} to repeat this run"
        ) from error
    return history


class Checkpoints:
    """Checkpoints in a folder, with the settings that determine the weights."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
        """Open the folder, or create it."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out must be a folder, but can't be created: {error}") from error
        self.folder, self.settings = folder, settings
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self.manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def restore(self, state: Any) -> tuple[Any, int]:
        """Return the last saved state and its step, or the given state and 0."""
        step = self.manager.latest_step()
        if step is None:
            return state, 0
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        try:
            settings = ocp.args.Composite(settings=ocp.args.JsonRestore())
            self.check(self.manager.restore(step, args=settings)["settings"])
            wanted = ocp.args.Composite(state=ocp.args.StandardRestore(like))
            return self.manager.restore(step, args=wanted)["state"], step
        except UserError:
            raise
        except Exception as error:  # orbax raises many kinds, also plain Exception
            raise UserError(
                f"{self.folder / str(step)} must be a whole checkpoint of this program, but can't "
                "be read: remove it to continue from the previous one, or choose another --out "
                f"({why(error)})"
            ) from error

    def check(self, saved: dict[str, Any]) -> None:
        """Reject checkpoints of another model or another training."""
        for name in self.settings | saved:
            ours, theirs = self.settings.get(name), saved.get(name)
            if ours != theirs:
                raise UserError(
                    f"{self.folder} must hold checkpoints of this training, but they are of one "
                    f"whose {name} is {theirs}, not {ours}: choose another --out"
                )

    def save(self, step: int, state: Any) -> None:
        """Save: write a folder under another name, then rename it."""
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), settings=ocp.args.JsonSave(self.settings)
        )
        try:
            self.manager.save(step, args=args)
        except Exception as error:  # such as a full disk, which orbax reports in many ways
            if jax.process_count() > 1:  # or another process has died
                raise
            raise UserError(f"{self.folder} can't be written: {why(error)}") from error


def why(error: Exception) -> str:
    """Return the end of an error's first line, where JAX and orbax put the wrapped error."""
    return (str(error).splitlines() or [type(error).__name__])[0][-200:]
