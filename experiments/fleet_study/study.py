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

from experiments.fleet_study.plan import CLONING, SUITE, Cell, Episodes, FleetPlan
from lwd_fleet.data.catalog import Catalog
from lwd_fleet.data.store import LocalStore
from lwd_fleet.data.summary import EpisodeSummary
from lwd_fleet.sim import robot
from lwd_fleet.sim.presets import observation_spec
from lwd_fleet.sim.rollout_worker import RolloutRequest
from lwd_fleet.sim.rollouts import Rollouts, split
from lwd_fleet.sim.shift import Shift
from lwd_learner.learner import Learner, load_policy
from lwd_learner.sim_policy import sim_policy
from lwd_learner.training_run import TrainingRun
from lwd_policy.flow_policy import FlowPolicy

_SAVE_EVERY = 2000  # updates

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
                self._record(
                    folder,
                    catalog,
                    name,
                    episodes,
                    observation_spec=json.loads(self._spec.to_json()),
                    observe_every=self.plan.observe_every,
                    expert_noise=self.plan.expert_noise,
                    plays=plays,
                )
            with closing(self._learner(folder, catalog, self._fresh(catalog, 0), CLONING, 0)) as learner:
                self._ingest(learner)

    def clone(self, seed: int) -> None:
        """The cloned policy of a training seed, and what it does in the deployment."""
        if not (self.root / f"seed_{seed}/cloned").exists():
            self._clone(seed)
        path = self.policy(seed, "cloned")
        with self._stage(f"seed_{seed}/sft", "base") as folder, self._catalog(folder) as catalog:
            version = catalog.register_policy(path.name, path.as_uri(), catalog.snapshot(), None, {})
            self._record(
                folder,
                catalog,
                "rollouts",
                self.plan.rolled_out(seed),
                policy=path,
                version=version,
                exploration=self.plan.exploration,
            )
            with closing(self._learner(folder, catalog, load_policy(path), CLONING, seed)) as learner:
                self._ingest(learner)
            self._keep_policy(path, folder)

    def _clone(self, seed: int) -> None:
        with (
            self._stage(f"seed_{seed}/cloned", "base", last=True) as folder,
            self._catalog(folder) as catalog,
        ):
            policy = self._fresh(catalog, seed)
            with closing(self._learner(folder, catalog, policy, CLONING, seed)) as learner:
                run = TrainingRun(learner, "bc", self.plan.clone_steps)
                self._train(run, self.plan.clone_steps, "cloning")
                self._keep_newest(learner, folder)

    def learn(self, seed: int, name: str, cell: Cell) -> None:
        """A method on all that is there before the fleet works; then, if the cell is online, on what the fleet brings
        while it works with what the method has learned."""
        plan = self.plan
        with self._stage(f"seed_{seed}/{name}", f"seed_{seed}/sft", last=True) as folder:
            state = folder / "learner" / "state"
            if cell.start != "sft" and not state.exists():
                self._copy(f"seed_{seed}/{cell.start}", folder, "learner/state")
            policy = load_policy(self.policy(seed, "sft"))
            with (
                self._catalog(folder) as catalog,
                closing(self._learner(folder, catalog, policy, cell, seed)) as learner,
            ):
                updates, per_wave = plan.updates(cell)
                run = TrainingRun(learner, "offline", updates - (plan.refit_steps if cell.refits else 0))
                waves = list(run.restored.get("waves", []))
                if cell.refits and run.steps == 0:
                    self._refit(learner)
                self._train(run, updates, "offline")
                if cell.online:
                    run = TrainingRun(learner, "online", plan.waves * per_wave)
                    for wave in range(len(waves), plan.waves):
                        waves.append(
                            self._work(folder, catalog, learner, plan.worked(seed, wave, cell), cell, wave)
                        )
                        if cell.refits and wave % plan.refit_every == plan.refit_every - 1:
                            self._refit(learner)
                        run.train(per_wave, self._steps("online", per_wave))
                        waves[-1] |= learner.trainer.report()
                        run.save({"waves": waves})
                    (folder / "waves.json").write_text(json.dumps(waves, indent=1) + "\n", encoding="utf-8")
                self._keep_newest(learner, folder)

    def _work(
        self, folder: Path, catalog: Catalog, learner: Learner, episodes: Episodes, cell: Cell, wave: int
    ) -> dict[str, Any]:
        """The fleet works for one wave with what was learned so far. Returns how that went."""
        version = learner.publish()
        path = Path(catalog.policy(version).uri.removeprefix("file://"))
        done = self._record(
            folder,
            catalog,
            f"wave {wave + 1} of {self.plan.waves}",
            episodes,
            policy=path,
            version=version,
            exploration=self.plan.exploration,
            operators=cell.operators,
        )
        self._ingest(learner, "online")
        assisted = [one for one in done if one.authors.get("human", 0)]
        alone = [one for one in done if not one.authors.get("human", 0)]
        return {
            "policy": path.name,
            "episodes": len(done),
            "steps": sum(one.steps for one in done),
            "human_steps": sum(one.authors.get("human", 0) for one in done),
            "succeeded_alone": sum(one.outcome == "success" for one in alone),
            "assisted": len(assisted),
            "succeeded_assisted": sum(one.outcome == "success" for one in assisted),
        }

    def _refit(self, learner: Learner) -> None:
        learner.refit(self.plan.refit_steps, self._steps("refit", self.plan.refit_steps))

    def _train(self, run: TrainingRun, total: int, title: str) -> None:
        """Up to so many updates of the run, which is saved now and then: an interrupted one goes on from there."""
        while run.steps < total:
            steps = min(_SAVE_EVERY, total - run.steps)
            run.train(steps, self._steps(title, total, run.steps))
            run.save()

    def evaluate(
        self,
        seed: int,
        name: str,
        development: bool = False,
        shift: Shift | None = None,
        wave: int | None = None,
    ) -> list[dict[str, Any]]:
        """Every scene once, without help. wave: with what the fleet worked with then, not with what the cell ended with.
        Returns the results."""
        return self._run(
            self.root,
            f"evaluation of {name} {seed} {'' if wave is None else wave}".strip(),
            self.plan.evaluated(development),
            policy=self.policy(seed, name) if wave is None else self._policy_of(seed, name, wave),
            shift=shift,
        )

    def course(self, seed: int, name: str) -> dict[str, Any]:
        """How a finished cell went: seconds, and how the fleet worked in each wave if it did."""
        folder = self.root / f"seed_{seed}" / name
        waves = folder / "waves.json"
        stages = [folder.with_name("cloned"), folder] if name == "sft" else [folder]
        return {
            "wall_s": round(sum(json.loads((stage / "wall_s.json").read_text()) for stage in stages)),
            "waves": json.loads(waves.read_text()) if waves.exists() else [],
        }

    def expert(self, shift: Shift, development: bool = True) -> list[dict[str, Any]]:
        """What the demonstrator reaches in the same scenes."""
        return self._run(self.root, "expert", self.plan.evaluated(development), shift=shift)

    def policy(self, seed: int, name: str) -> Path:
        """The checkpoint that a stage ended with. Raises FileNotFoundError."""
        (path,) = sorted((self.root / f"seed_{seed}" / name / "policy").iterdir())
        return path

    def _policy_of(self, seed: int, name: str, wave: int) -> Path:
        version = self.course(seed, name)["waves"][wave]["policy"]
        return self.root / f"seed_{seed}" / name / "policies" / version

    # Parts of stages ---------------------------------------------------------------------------------

    @contextmanager
    def _stage(self, name: str, source: str = "", last: bool = False) -> Iterator[Path]:
        """A directory that is complete or not there; an interrupted stage goes on with what it left.

        source: the stage whose episodes and replay it begins with. last: no other stage starts from its own replay,
        which is removed (a gigabyte each).
        """
        done = self.root / name
        if done.exists():
            raise FileExistsError(f"{done} is there already; remove it to do this stage again")
        partial = self.root / f"{name}.partial"
        partial.mkdir(parents=True, exist_ok=True)
        if source and not (partial / "catalog.db").exists():
            self._copy(source, partial, "learner/replay", "learner/held_out")
            shutil.copy(self.root / source / "catalog.db", partial)  # the last: it says that all is there
        before = partial / "wall_s.json"
        spent = json.loads(before.read_text()) if before.exists() else 0.0
        began = time.monotonic()
        try:
            yield partial
        finally:
            before.write_text(json.dumps(spent + time.monotonic() - began))
        replay = ("learner/replay", "learner/held_out") if last else ()
        for heavy in ("spool", "work", *replay):
            shutil.rmtree(partial / heavy, ignore_errors=True)
        partial.rename(done)

    def _copy(self, source: str, folder: Path, *parts: str) -> None:
        """Of another stage."""
        for part in parts:
            shutil.rmtree(folder / part, ignore_errors=True)  # of a copy that was interrupted
            shutil.copytree(self.root / source / part, folder / part)

    @contextmanager
    def _catalog(self, folder: Path) -> Iterator[Catalog]:
        with Catalog(folder / "catalog.db") as catalog:
            yield catalog

    def _fresh(self, catalog: Catalog, seed: int) -> FlowPolicy:
        torch.manual_seed(seed)
        plan = self.plan
        return sim_policy(
            plan.observation,
            catalog,
            self.store,
            plan.observe_every,
            SUITE,
            plan.expert_size,
            plan.acting_noise,
        )

    def _learner(self, folder: Path, catalog: Catalog, policy: FlowPolicy, cell: Cell, seed: int) -> Learner:
        config, device = self.plan.learner(cell), self.plan.device
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

    def _record(
        self, folder: Path, catalog: Catalog, title: str, episodes: Episodes, **request: Any
    ) -> list[EpisodeSummary]:
        """Run episodes and commit them to the stage's catalog. What an interrupted stage has committed is not run again."""
        shutil.rmtree(folder / "spool", ignore_errors=True)  # of episodes that were never committed
        there = self._committed(catalog)
        self._run(
            folder,
            title,
            [scene for scene in episodes if scene not in there],
            store=str(self.store.root),
            catalog=str(folder / "catalog.db"),
            **request,
        )
        there = self._committed(catalog)
        lost = [scene for scene in episodes if scene not in there]
        if lost:
            raise RuntimeError(f"{title}: {len(lost)} episodes were not committed, the first: {lost[0]}")
        return [there[scene] for scene in episodes]

    def _committed(self, catalog: Catalog) -> dict[tuple[str, int], EpisodeSummary]:
        """By task and scene."""
        rows = catalog.episodes_since(0)
        return {(row.summary.task, row.summary.seed): row.summary for row in rows}

    def _run(
        self,
        folder: Path,
        title: str,
        episodes: Episodes,
        policy: Path | None = None,
        version: int = 0,
        shift: Shift | None = None,
        **other: Any,
    ) -> list[dict[str, Any]]:
        """Run episodes in worker processes. A policy works in the deployment, an expert without a shift, unless one is
        given."""
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
        requests = split(request, self.workers)
        if request.catalog:
            requests = [replace(one, spool=str(folder / "spool" / f"{n}")) for n, one in enumerate(requests)]
        results = []
        with Rollouts(requests, folder / "work" / title.replace(" ", "_")) as rollouts:
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
