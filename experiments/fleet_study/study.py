# SPDX-License-Identifier: Apache-2.0
"""The stages of the fleet study. Each leaves a directory behind that the next ones start from, and is done once.

base/                   demonstrations and play of all tasks, ingested: common to all training seeds
seed_<s>/cloned/        the cloned policy
seed_<s>/sft/           the same and its rollouts in the deployment: what every method starts from
seed_<s>/<method>/      a method's run
store/                  episodes of all of them, by content
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from experiments.fleet_study.plan import SUITE, Episodes, FleetPlan
from lwd_fleet.data.catalog import Catalog
from lwd_fleet.data.store import LocalStore
from lwd_fleet.sim import robot
from lwd_fleet.sim.presets import observation_spec
from lwd_fleet.sim.rollout_worker import RolloutRequest
from lwd_fleet.sim.rollouts import Rollouts, split
from lwd_fleet.sim.shift import Shift
from lwd_learner.learner import Learner, load_policy
from lwd_learner.sim_policy import sim_policy
from lwd_learner.training_run import TrainingRun
from lwd_policy.flow_policy import FlowPolicy

_SAVE_EVERY = 5000  # updates of cloning

DEPLOYMENT = Path(__file__).parent / "deployment.yaml"

Progress = Callable[[str, int, int, str], None]  # stage, done, total, note


def deployment_shift() -> Shift:
    """What every deployed robot differs in from the demonstrations."""
    return Shift.from_json(json.dumps(yaml.safe_load(DEPLOYMENT.read_text(encoding="utf-8"))["shift"]))


class Study:
    """All stages in one directory. `progress` is told how far they are."""

    def __init__(self, root: Path, plan: FleetPlan, workers: int, progress: Progress) -> None:
        self.root, self.plan, self.workers = root.absolute(), plan, workers
        self._progress = progress
        self.root.mkdir(parents=True, exist_ok=True)
        self.store = LocalStore(self.root / "store")
        self._spec = observation_spec(plan.observation, suite=SUITE)
        self._robot_file = robot.write(self.root)

    # Stages ------------------------------------------------------------------------------------------

    def gather(self) -> None:
        """Demonstrations and play, recorded and ingested."""
        with self._stage("base") as folder, self._catalog(folder) as catalog:
            for name, episodes, plays in (
                ("demonstrations", self.plan.demonstrated(), False),
                ("play", self.plan.played(), True),
            ):
                self._roll(
                    folder,
                    name,
                    episodes,
                    observation_spec=json.loads(self._spec.to_json()),
                    observe_every=self.plan.observe_every,
                    expert_noise=self.plan.expert_noise,
                    plays=plays,
                )
            with closing(self._learner(folder, catalog, self._fresh(catalog, 0), "bc", 0)) as learner:
                self._ingest(learner)

    def clone(self, seed: int) -> None:
        """The cloned policy of a training seed, and what it does in the deployment."""
        if not (self.root / f"seed_{seed}/cloned").exists():
            self._clone(seed)
        path = self.policy(seed, "cloned")
        with self._stage(f"seed_{seed}/sft") as folder:
            self._copy("base", folder)
            self._keep_policy(path, folder)
            with self._catalog(folder) as catalog:
                version = catalog.register_policy(path.name, path.as_uri(), catalog.snapshot(), None, {})
                episodes = self.plan.rolled_out(seed)
                self._roll(
                    folder,
                    "rollouts",
                    episodes,
                    policy=path,
                    version=version,
                    exploration=self.plan.exploration,
                )
                with closing(self._learner(folder, catalog, load_policy(path), "bc", seed)) as learner:
                    self._ingest(learner)

    def _clone(self, seed: int) -> None:
        """An hour on a core: what is interrupted goes on from the last state that was saved."""
        total = self.plan.clone_steps
        with self._stage(f"seed_{seed}/cloned", last=True, resumes=True) as folder:
            if not (folder / "catalog.db").exists():
                self._copy("base", folder)
            with self._catalog(folder) as catalog:
                policy = self._fresh(catalog, seed)
                with closing(self._learner(folder, catalog, policy, "bc", seed)) as learner:
                    run = TrainingRun(learner, "bc", total)
                    while run.steps < total:
                        steps = min(_SAVE_EVERY, total - run.steps)
                        run.train(steps, self._steps("cloning", total, run.steps))
                        run.save()
                    self._keep_newest(learner, folder)

    def learn_offline(self, seed: int, method: str, name: str, refits: bool) -> None:
        """A method on all that is there before the fleet works."""
        with self._stage(f"seed_{seed}/{name}", last=True) as folder:
            self._copy(f"seed_{seed}/sft", folder)
            with (
                self._catalog(folder) as catalog,
                closing(self._started(seed, folder, catalog, method)) as learner,
            ):
                self._offline(learner, refits)
                self._keep_newest(learner, folder)

    def _offline(self, learner: Learner, refits: bool) -> None:
        run = TrainingRun(learner, "offline", self.plan.offline_steps)
        if refits:
            learner.refit(self.plan.refit_steps, self._steps("refit", self.plan.refit_steps))
        run.train(self.plan.offline_steps, self._steps("offline", self.plan.offline_steps))

    def learn_online(self, seed: int, method: str, name: str, refits: bool, operators: bool) -> None:
        """A method offline, then on what the fleet brings while it works with what the method has learned."""
        plan = self.plan
        with self._stage(f"seed_{seed}/{name}", last=True) as folder:
            self._copy(f"seed_{seed}/sft", folder)
            with (
                self._catalog(folder) as catalog,
                closing(self._started(seed, folder, catalog, method)) as learner,
            ):
                self._offline(learner, refits)
                run = TrainingRun(learner, "online")
                waves = []
                for wave in range(plan.waves):
                    version = learner.publish()
                    path = Path(catalog.policy(version).uri.removeprefix("file://"))
                    results = self._roll(
                        folder,
                        f"wave {wave + 1} of {plan.waves}",
                        plan.worked(seed, wave),
                        policy=path,
                        version=version,
                        exploration=plan.exploration,
                        operators=operators,
                    )
                    waves.append(
                        {
                            "success": sum(one["success"] for one in results) / len(results),
                            "human_steps": sum(one["human_steps"] for one in results),
                            "steps": sum(one["steps"] for one in results),
                        }
                    )
                    self._ingest(learner, "online")
                    if refits and wave % plan.refit_every == plan.refit_every - 1:
                        learner.refit(plan.refit_steps, self._steps("refit", plan.refit_steps))
                    run.train(plan.wave_steps, self._steps("online", plan.wave_steps))
                    waves[-1] |= learner.trainer.report()
                (folder / "waves.json").write_text(json.dumps(waves, indent=1) + "\n", encoding="utf-8")
                self._keep_newest(learner, folder)

    def evaluate(
        self, seed: int, name: str, development: bool = False, shift: Shift | None = None
    ) -> list[dict[str, Any]]:
        """Every scene once, without help. Returns the results."""
        return self._roll(
            None,
            f"evaluation of {name}",
            self.plan.evaluated(development),
            policy=self.policy(seed, name),
            shift=shift,
        )

    def expert(self, shift: Shift, development: bool = True) -> list[dict[str, Any]]:
        """What the demonstrator reaches in the same scenes."""
        return self._roll(None, "expert", self.plan.evaluated(development), shift=shift)

    def policy(self, seed: int, name: str) -> Path:
        """The checkpoint that a stage ended with. Raises FileNotFoundError."""
        (path,) = sorted((self.root / f"seed_{seed}" / name / "policy").iterdir())
        return path

    # Parts of stages ---------------------------------------------------------------------------------

    @contextmanager
    def _stage(self, name: str, last: bool = False, resumes: bool = False) -> Iterator[Path]:
        """A directory that is complete, or not there: an interrupted stage begins again, unless it `resumes` from what it
        left. last: no other stage starts from its replay, which is removed (a gigabyte each)."""
        done = self.root / name
        if done.exists():
            raise FileExistsError(f"{done} is there already; remove it to do this stage again")
        partial = self.root / f"{name}.partial"
        if not resumes:
            shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        yield partial
        (partial / "wall_s.json").write_text(json.dumps(time.monotonic() - began))
        for heavy in ("spool", "work", "state", *(["learner"] if last else [])):
            shutil.rmtree(partial / heavy, ignore_errors=True)
        partial.rename(done)

    def _copy(self, source: str, folder: Path) -> None:
        """Episodes and replay of another stage."""
        for replay in ("replay", "held_out"):
            copied = folder / "learner" / replay
            shutil.rmtree(copied, ignore_errors=True)  # of a copy that was interrupted
            shutil.copytree(self.root / source / "learner" / replay, copied)
        shutil.copy(self.root / source / "catalog.db", folder)  # the last: it says that all is there

    @contextmanager
    def _catalog(self, folder: Path) -> Iterator[Catalog]:
        with Catalog(folder / "catalog.db") as catalog:
            yield catalog

    def _fresh(self, catalog: Catalog, seed: int) -> FlowPolicy:
        torch.manual_seed(seed)
        plan = self.plan
        return sim_policy(plan.observation, catalog, self.store, plan.observe_every, SUITE, plan.expert_size)

    def _started(self, seed: int, folder: Path, catalog: Catalog, method: str) -> Learner:
        policy = load_policy(self.policy(seed, "sft"))
        return self._learner(folder, catalog, policy, method, seed)

    def _learner(self, folder: Path, catalog: Catalog, policy: FlowPolicy, method: str, seed: int) -> Learner:
        config, device = self.plan.learner(method), self.plan.device
        return Learner(folder / "learner", catalog, self.store, policy, config, device, seed)

    def _keep_newest(self, learner: Learner, folder: Path) -> None:
        version = learner.publish()
        self._keep_policy(Path(learner.catalog.policy(version).uri.removeprefix("file://")), folder)

    def _keep_policy(self, path: Path, folder: Path) -> None:
        shutil.copytree(path, folder / "policy" / path.name)  # a checkpoint is named by its digest

    def _ingest(self, learner: Learner, source: Any = "offline") -> None:
        result = learner.ingest(source, lambda done, total: self._progress("ingest", done, total, ""))
        if result.refused:
            raise RuntimeError(f"{len(result.refused)} episodes were refused, the first: {result.refused[0]}")

    def _roll(
        self,
        folder: Path | None,
        title: str,
        episodes: Episodes,
        policy: Path | None = None,
        version: int = 0,
        shift: Shift | None = None,
        **other: Any,
    ) -> list[dict[str, Any]]:
        """Run episodes; record them into the stage's catalog where there is one. A policy works in the deployment, an
        expert without a shift, unless one is given."""
        if shift is None:
            shift = Shift() if policy is None else deployment_shift()
        request = RolloutRequest(
            robot_file=str(self._robot_file),
            episodes=episodes,
            shift=shift.to_json(),
            robots=16,
            policy=str(policy or ""),
            policy_version=version,
            **other,
        )
        if folder is not None:
            request = replace(request, store=str(self.store.root), catalog=str(folder / "catalog.db"))
        requests = split(request, self.workers)
        if folder is not None:
            requests = [replace(one, spool=str(folder / "spool" / f"{n}")) for n, one in enumerate(requests)]
        results = []
        work = (folder or self.root) / "work" / title.replace(" ", "_")
        with Rollouts(requests, work) as rollouts:
            for result in rollouts:
                results.append(result)
                won = sum(one["success"] for one in results) / len(results)
                self._progress(title, len(results), len(episodes), f"{won:.2f} succeed")
        return results

    def _steps(self, title: str, total: int, done: int = 0) -> Callable[[int, Mapping[str, float]], None]:
        def show(step: int, metrics: Mapping[str, float]) -> None:
            loss = metrics.get("clone_loss", metrics.get("critic_loss", 0.0))
            self._progress(title, done + step, total, f"loss {loss:.4f}")

        return show
