# SPDX-License-Identifier: Apache-2.0
"""How much of everything the fleet study does, and which scenes are for what. algorithm.md 1.3 and 1.4 for the proportions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from lwd_learner.divl import DivlConfig
from lwd_learner.learner import LearnerConfig
from lwd_learner.methods import named
from lwd_learner.qam import QamConfig
from lwd_learner.schedule import Schedule
from lwd_learner.trainer import TrainerConfig

SUITE = "eight"
SHORT = ("restock", "correct", "freezer", "open_cooler")
LONG = ("tea", "juice", "cocktail", "shoebox")

# Ranges of scene seeds. No scene is used twice, and none of another range is ever trained on.
DEVELOPMENT_SEED = 500_000
TEST_SEED = 0
DEMONSTRATION_SEED = 2_000_000
PLAY_SEED = 3_000_000
ROLLOUT_SEED = 4_000_000
ONLINE_SEED = 5_000_000
_RANGE = 20_000  # scenes of one training seed within a range, of one task within that: a tenth

# Hours of the paper's offline data (Table IV): demonstrations, rollouts (successful and failed), play.
HOURS = {
    "restock": (14.5, 12.4, 7.5),
    "correct": (12.7, 12.5, 9.7),
    "freezer": (10.8, 12.3, 3.3),
    "open_cooler": (11.1, 15.0, 0.8),
    "tea": (102.3, 16.8, 43.6),
    "juice": (100.5, 32.1, 47.1),
    "cocktail": (47.3, 11.8, 28.0),
    "shoebox": (37.3, 15.0, 48.0),
}
ROBOTS = {task: 1 if task in SHORT else 3 for task in HOURS}  # four on grocery, three on each long task: 16

Episodes = list[tuple[str, int]]  # task and scene seed


def as_it_is(config: LearnerConfig) -> LearnerConfig:
    """No settings of its own."""
    return config


@dataclass(frozen=True)
class Cell:
    """How a row of the table learns."""

    method: str  # of `lwd_learner.methods`
    start: str = "sft"  # the cell that it goes on from: `sft`, or one that learned offline
    online: bool = True  # whether the fleet works with what it has learned
    refits: bool = False  # clones what succeeded in the deployment before, and every few waves
    operators: bool = True  # people help the fleet while it gathers data
    robots: int = 16  # of the fleet
    tasks: tuple[str, ...] = ()  # that the fleet works on; none: on all
    adapt: Callable[[LearnerConfig], LearnerConfig] = as_it_is  # its own settings in the place of the plan's


CLONING = Cell("bc", online=False)  # what all others start from

CELLS = {
    "sft_continued": Cell("sft_continued", online=False),
    "filtered_bc": Cell("filtered_bc"),
    "recap": Cell("recap"),
    "hg_dagger": Cell("hg_dagger"),
    "hg_dagger_offline": Cell("hg_dagger_offline"),
    "iql_expectile": Cell("iql_awr"),
    "lwd_paper": Cell("lwd_paper"),
    "lwd_offline": Cell("lwd", online=False, refits=True),
    "lwd_online": Cell("lwd", start="lwd_offline", refits=True),
    "lwd_online_no_interventions": Cell("lwd", start="lwd_offline", refits=True, operators=False),
}


@dataclass(frozen=True)
class FleetPlan:
    """The study on two cores."""

    tasks: tuple[str, ...] = (*SHORT, *LONG)
    observation: str = "keypoints"
    expert_size: str = "tiny"  # or "base", on a GPU
    device: str = "cpu"  # of the learner; episodes are always run on processors
    demonstrations: int = 400  # of each task; rollouts and play follow in proportion to the paper's hours
    expert_noise: float = (
        0.5  # of the demonstrator; at 1 the clone of a task in seven steps succeeds less (.57, not .67)
    )
    observe_every: int = 1  # policy steps between the demonstrator's observations
    clone_steps: int = 100_000  # about 12,000 of each task
    offline_steps: int = 3_000
    waves: int = 12  # of online episodes
    episodes_per_wave: int = 4  # of each robot
    wave_steps: int = 150  # of learning after each wave
    refit_steps: int = (
        5_000  # of methods that refit, offline and every few waves; methods that only clone get them, too
    )
    refit_every: int = 4  # waves
    acting_noise: float = (
        0.3  # that policies act from; at 1 the clones of long tasks succeed a tenth to a third less
    )
    exploration: float = 0.1  # of robots that gather data, in units of normalised actions
    evaluation_episodes: int = 50  # of each task
    kl_budget: float = 0.1  # nat per executed step
    critic_rate: float = 5e-4
    adjoint_rows: int = 64  # of a batch that adjoint matching, the costly one, uses; others use all
    task_weights: dict[str, float] = field(default_factory=lambda: dict.fromkeys(LONG, 4.0))
    n_step: dict[str, int] = field(default_factory=lambda: dict.fromkeys(LONG, 10))

    def quick(self) -> FleetPlan:
        """Every step once: to see that it runs."""
        return replace(
            self,
            demonstrations=6,
            clone_steps=50,
            offline_steps=10,
            waves=1,
            episodes_per_wave=1,
            wave_steps=5,
            refit_steps=5,
            refit_every=1,
            evaluation_episodes=2,
        )

    def learner(self, cell: Cell) -> LearnerConfig:
        """Networks and rates are the same for every method. Rates of policies fall: a policy that is evaluated right after
        updates at a constant rate is worse than it need be."""
        adapted = named(cell.method).adapt(TrainerConfig())
        trainer = replace(
            TrainerConfig(),
            divl=DivlConfig(),
            extraction=replace(QamConfig(), kl_budget=self.kl_budget),
            policy_rows=self.adjoint_rows if isinstance(adapted.extraction, QamConfig) else None,
            policy_schedule=Schedule("cosine", warm_up=100),
            critic_rate=self.critic_rate,
        )
        return cell.adapt(
            LearnerConfig(
                trainer,
                n_step=self.n_step,
                stride=self.observe_every,
                task_weights=self.task_weights,
                method=cell.method,
            )
        )

    def updates(self, cell: Cell) -> tuple[int, int]:
        """Of a cell: offline, refitting included, and after each wave, without. Cells that only clone do as many updates as
        those that refit."""
        clones = not named(cell.method).judges
        offline = self.offline_steps + (self.refit_steps if clones or cell.refits else 0)
        return offline, self.wave_steps + (self.refit_steps // self.refit_every if clones else 0)

    def demonstrated(self) -> Episodes:
        """Common to all training seeds."""
        return list(self._scenes(DEMONSTRATION_SEED, 0, lambda task: self.demonstrations))

    def played(self) -> Episodes:
        """Common to all training seeds."""
        return list(self._scenes(PLAY_SEED, 0, lambda task: self._in_proportion(task, 2)))

    def rolled_out(self, seed: int) -> Episodes:
        """Of the cloned policy in the deployment, before anything is learned there."""
        return list(self._scenes(ROLLOUT_SEED, seed, lambda task: self._in_proportion(task, 1)))

    def worked(self, seed: int, wave: int, cell: Cell) -> Episodes:
        """Of a cell's fleet in one wave. Robots are shared out over tasks as in the whole fleet."""
        tasks = cell.tasks or self.tasks
        share = cell.robots * self.episodes_per_wave / sum(ROBOTS[task] for task in tasks)
        per_task = {task: round(ROBOTS[task] * share) if task in tasks else 0 for task in self.tasks}
        scenes = self._scenes(ONLINE_SEED, seed, lambda task: per_task[task] * (wave + 1))
        done = {task: per_task[task] * wave for task in self.tasks}
        return [(task, scene) for task, scene in scenes if scene % (_RANGE // 10) >= done[task]]

    def evaluated(self, development: bool = False) -> Episodes:
        """The same scenes for every method and training seed."""
        first = DEVELOPMENT_SEED if development else TEST_SEED
        return list(self._scenes(first, 0, lambda task: self.evaluation_episodes))

    def _in_proportion(self, task: str, column: int) -> int:
        return max(1, round(self.demonstrations * HOURS[task][column] / HOURS[task][0]))

    def _scenes(self, first: int, seed: int, count: Callable[[str], int]) -> Iterator[tuple[str, int]]:
        """Tasks take turns, so that each worker has its share of each."""
        counts = {task: count(task) for task in self.tasks}
        for number in range(max(counts.values())):
            for place, task in enumerate(HOURS):
                if number < counts.get(task, 0):
                    yield task, first + seed * _RANGE + place * (_RANGE // 10) + number
