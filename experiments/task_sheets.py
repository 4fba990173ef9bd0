# SPDX-License-Identifier: Apache-2.0
"""Show what the simulated tasks are: contact sheets of an episode that succeeds and of one that fails, and a page about them.

    scripts/run python -m experiments.task_sheets                          # every task of the suite, and the page
    scripts/run python -m experiments.task_sheets --task restock           # one task's sheets; the page is written anew

The texts come from the tasks themselves. In the episode that fails, a demonstrator who cannot see where the tool is works
with arms that stand a few centimetres from where they should be.
"""

from __future__ import annotations

import inspect
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import typer
from numpy.typing import NDArray

from experiments.fleet_study.study import deployment_shift
from lwd_fleet.sim.experts import STEP_S, Expert
from lwd_fleet.sim.scene import TICK_S
from lwd_fleet.sim.shift import Shift
from lwd_fleet.sim.tasks import SPLITS, SUITES, Suite, Task
from lwd_fleet.sim.world import World

Picture = NDArray[np.uint8]

DIRECTORY = Path("docs/tasks")
PICTURE_PX = 224
FRAMES, COLUMNS = 8, 4
TRIES = 20  # episodes among which the one to show is looked for
BLIND_OFFSETS_M = (0.018, 0.022, 0.026, 0.030)  # of both arms along x; 0.6 of it along y
_CAPTION_PX, _TITLE_PX = 22, 30
_WRITING = cv2.FONT_HERSHEY_SIMPLEX
_TICKS = round(STEP_S / TICK_S)


@dataclass(frozen=True)
class Frame:
    """The top camera's view at one moment."""

    time_s: float
    scores: tuple[float, ...]
    picture: Picture


@dataclass(frozen=True)
class Film:
    """One episode."""

    seed: int
    instruction: str
    done: bool
    frames: list[Frame]

    @property
    def score(self) -> float:
        """Sum of the sub-steps in the end."""
        return sum(self.frames[-1].scores)


def main(
    suite: Annotated[str, typer.Option(help=f"One of {', '.join(SUITES)}")] = "eight",
    task: Annotated[str, typer.Option(help="Only this task's sheets")] = "",
    out: Annotated[Path, typer.Option(help="Where sheets and page go")] = DIRECTORY,
) -> None:
    """Write a sheet of success and one of failure per task, and README.md."""
    out.mkdir(parents=True, exist_ok=True)
    for member in SUITES[suite].tasks:
        if task in ("", member.name):
            write_sheet(out / f"{member.name}_success.png", member, successful(member))
            write_sheet(out / f"{member.name}_failure.png", member, failed(member))
            print(f"{member.name}: {out}/{member.name}_success.png, _failure.png", file=sys.stderr)
    (out / "README.md").write_text(page(SUITES[suite]), encoding="utf-8")


# Episodes ------------------------------------------------------------------------------------------------


def successful(task: Task) -> Film:
    """The first episode in which the demonstrator reaches everything."""
    films = (film(World(task.name), seed) for seed in range(TRIES))
    return next(each for each in films if each.done)


def failed(task: Task) -> Film:
    """Of blind episodes, the failure that got furthest; it says most."""
    found: list[Film] = []
    for offset in BLIND_OFFSETS_M:
        world = World(task.name, Shift(calibration_offset_m=(offset, 0.6 * offset) * 2))
        found += [each for seed in range(TRIES // 4) if not (each := film(world, seed, blind=True)).done]
    return max(found, key=lambda each: each.score)


def film(world: World, seed: int, blind: bool = False) -> Film:
    """Run the demonstrator, look from above after every step."""
    world.reset(seed)
    expert = Expert(world, np.random.default_rng(seed), sees_the_tool=not blind)
    frames, command = [_look(world)], world.joint_positions
    while world.time_s < world.time_limit_s - 1e-9 and not world.done():
        target = expert.command()
        for tick in range(1, _TICKS + 1):
            world.step(command + (target - command) * tick / _TICKS)
        command = target
        frames.append(_look(world))
    return Film(seed, world.instruction, world.done(), frames)


def _look(world: World) -> Frame:
    return Frame(world.time_s, world.sub_step_scores(), world.render("top", PICTURE_PX))


# Pictures ------------------------------------------------------------------------------------------------


def write_sheet(path: Path, task: Task, film: Film) -> None:
    """PNG of moments at equal distances, each with its time and the scores of the sub-steps."""
    chosen = np.linspace(0, len(film.frames) - 1, FRAMES).round().astype(int)
    cells = [_cell(film.frames[index]) for index in chosen]
    rows = [np.hstack(cells[first : first + COLUMNS]) for first in range(0, FRAMES, COLUMNS)]
    ending = "done" if film.done else "not done"
    title = f'{task.name}, seed {film.seed}: "{film.instruction}" ({ending})'
    sheet = np.vstack([_text(title, rows[0].shape[1], _TITLE_PX, 0.5), *rows])
    cv2.imwrite(str(path), sheet[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 9])


def _cell(frame: Frame) -> Picture:
    scores = "  ".join(f"{score:g}" for score in frame.scores)
    caption = _text(f"{frame.time_s:4.1f} s:  {scores}", PICTURE_PX, _CAPTION_PX, 0.42)
    bordered = np.vstack([frame.picture, caption])
    bordered[:, -1] = 255
    return bordered


def _text(text: str, width: int, height: int, scale: float) -> Picture:
    """Dark letters on white, smaller if they would not fit."""
    strip: Picture = np.full((height, width, 3), 255, dtype=np.uint8)
    (needed, _), _ = cv2.getTextSize(text, _WRITING, scale, 1)
    fitting = min(scale, scale * (width - 12) / max(needed, 1))
    cv2.putText(strip, text, (6, height - 8), _WRITING, fitting, (30, 30, 30), 1, cv2.LINE_AA)
    return strip


# The page ------------------------------------------------------------------------------------------------


def page(suite: Suite) -> str:
    """Markdown: one section per task."""
    contents = "\n".join(f"- [`{task.name}`](#{task.name}): {task.summary}" for task in suite.tasks)
    sections = [_deployment(deployment_shift()), *(_section(task) for task in suite.tasks)]
    return "\n".join([_INTRODUCTION, contents, "", *sections])


_SHIFTED = {
    "placement_range_scale": "The zones in which things are put are {} times as long and wide.",
    "calibration_offset_m": "The arms stand elsewhere than they believe, by (left x, y, right x, y) {} m: what a policy knows of "
    "its tools from kinematics is off by as much, in every task. The grasp radius is 0.028 m.",
    "friction": "Friction of all contacts is {} of what it was: what is let go or pushed slides further.",
    "object_scale": "Things that are taken are {} times as large; lids, doors and boxes are not, so what goes in has less room.",
    "command_latency_ticks": "Commands take effect {} tick(s) of 20 ms later.",
    "colour_jitter": "Colours of things and table differ by a standard deviation of {} per channel; pixels only.",
    "light_jitter": "Brightness and direction of the light differ by a standard deviation of {}; pixels only.",
    "camera_offset_m": "The top camera stands elsewhere by {} m; pixels only.",
    "camera_jitter_m": "Each camera stands elsewhere by a standard deviation of {} m; pixels only.",
    "calibration_sigma_m": "The arms' calibration differs from episode to episode by a standard deviation of {} m more.",
}


def _deployment(shift: Shift) -> str:
    changed = json.loads(shift.to_json())
    lines = "\n".join(f"- {_SHIFTED[name].format(str(value).strip('[]'))}" for name, value in changed.items())
    return f"""## The deployment of the fleet study

All robots of `experiments/fleet.py` and all its evaluations differ from the demonstrations like this, in every task
(`experiments/fleet_study/deployment.yaml`):

{lines}
"""


def _section(task: Task) -> str:
    goals = len(task.goals)
    wordings = {split: len(task.instructions(split, task.goals[0])) for split in SPLITS}
    steps = "\n".join(f"{index}. {step}" for index, step in enumerate(task.sub_steps, 1))
    module = inspect.getmodule(task.progress)
    story = _paragraph(module).partition(": ")[2] if module else task.summary
    example = task.instructions("train", task.goals[0])[0]
    return f"""## {task.name}

{story[:1].upper()}{story[1:]}

Sub-steps:

{steps}

How they are judged: {_paragraph(task.progress)}

Time limit {task.time_limit_s:g} s; {goals} goals, such as "{example}"; per goal {wordings["train"]} wordings to
learn from and {wordings["heldout"]} that are held out.

![{task.name}, an episode that succeeds]({task.name}_success.png)

![{task.name}, an episode that fails]({task.name}_failure.png)
"""


def _paragraph(thing: object) -> str:
    """A docstring's lines as Markdown paragraphs."""
    text = inspect.getdoc(thing) or ""
    return "\n\n".join(" ".join(block.split()) for block in text.split("\n\n"))


_INTRODUCTION = """# The simulated tasks

Written by `scripts/run python -m experiments.task_sheets` from the tasks themselves (`lwd_fleet/sim/tasks`); change those,
not this page.

Every task needs both arms or the arm that fits, and its instruction: several goals are possible in the same scene. A
seed fixes positions, roles and wording. All is judged by the true state of the simulator, never by what a policy sees:
each sub-step scores 1, or 0.5 where it was reached with a flaw that its description names, or 0. An episode succeeds when
the whole task is fulfilled before the time limit; reaching the limit is a failure. Short tasks know no flaws.

Arms pass through each other and through fixtures, as only things collide, with each other, the table and the fixtures. A
gripper that closes within 28 mm of a grasp point holds it until it opens; the handle of a lid or door turns freely
between the fingers.

A deployment differs from the demonstrations by a *shift*: the range of positions, the arms' calibration, camera, light,
colours, friction, sizes and latency. The second sheet of each task shows what a calibration error does to a demonstrator
who trusts the robot's own kinematics and cannot see the tool.

Pictures are the top camera's, with the time and the score of each sub-step.
"""


if __name__ == "__main__":
    typer.run(main)
