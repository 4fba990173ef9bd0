# SPDX-License-Identifier: Apache-2.0
"""How much of everything the demonstration does. Where the numbers come from: docs/demo.md."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from lwd_learner.divl import DivlConfig
from lwd_learner.learner import LearnerConfig
from lwd_learner.qam import QamConfig
from lwd_learner.trainer import TrainerConfig

# Ranges of scene seeds: no scene is used twice, and none of evaluation is ever trained on. Development uses 500,000 on.
EVALUATION_SEED = 0
DEMONSTRATION_SEED = 2_000_000
ROLLOUT_SEED = 3_000_000
HEADLESS_SEED = 4_000_000


@dataclass(frozen=True)
class DemoPlan:
    """The demonstration on two cores in a quarter of an hour."""

    task: str = "place"
    second_task: str = "stow"  # multi-stage: runs and is shown, without a claim
    observation: str = "images"  # "images" or "keypoints"
    shift: str = "demo"  # of every robot that is deployed; demonstrations know nothing of it
    demonstrations: int = 400
    second_demonstrations: int = 60
    observe_every: int = 1  # policy steps between the demonstrator's observations
    clone_steps: int = 14_000  # twice as many are no better beyond chance: docs/demo.md
    rollouts: int = 200  # of the cloned policy under the shift, before any learning
    offline_steps: int = 1600  # the first half or so trains the critic only, until it can tell outcomes apart
    online_s: float = 150.0  # time the robots work while the learner learns
    refit_steps: int = 1000  # of cloning what succeeded in deployment, at the beginning of a phase
    refit_every: int = 200  # steps of online learning between two of these
    publish_every: int = 50
    evaluation_episodes: int = 200
    second_evaluation_episodes: int = 20
    n_step: dict[str, int] = field(default_factory=lambda: {"stow": 10})
    kl_budget: float = (
        0.05  # nat per executed step; no more, while the critic hardly ranks actions: docs/demo.md
    )
    critic_rate: float = 1e-3  # Adam; twice the published one: there are minutes, not hours
    policy_rows: int = 64
    tau_ramp_steps: int = 500
    seed: int = 0

    def full(self) -> DemoPlan:
        """With an evaluation of the multi-stage task that is worth a number."""
        return replace(self, second_evaluation_episodes=self.evaluation_episodes)

    def quick(self) -> DemoPlan:
        """Every step once, in a minute or two: to see that it runs, not what it is worth."""
        return replace(
            self,
            observation="keypoints",
            demonstrations=24,
            second_demonstrations=4,
            clone_steps=150,
            rollouts=12,
            offline_steps=10,
            refit_steps=10,
            refit_every=20,
            online_s=25.0,
            publish_every=5,
            evaluation_episodes=6,
            second_evaluation_episodes=2,
        )

    @property
    def learner(self) -> LearnerConfig:
        """The same for every phase and for the learner node, or its saved state could not be continued."""
        default = TrainerConfig()
        trainer = replace(
            default,
            divl=replace(DivlConfig(), tau_ramp_steps=self.tau_ramp_steps),
            extraction=replace(QamConfig(), kl_budget=self.kl_budget),
            policy_rows=self.policy_rows,
            critic_rate=self.critic_rate,
        )
        return LearnerConfig(trainer, n_step=self.n_step, stride=self.observe_every)
