# SPDX-License-Identifier: Apache-2.0
"""`lwd demo`: the whole loop once, on simulated robots, from demonstrations to a report.

Demonstrations -> cloned policy ("before") -> its rollouts under a deployment shift -> DIVL and QAM offline -> two
robots as ROS processes and headless ones work while the learner learns and publishes ("after"). Filtered cloning gets
the same data and the same seconds. All four are evaluated on the same scenes, which nothing was trained on.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lwd_fleet.data.catalog import Catalog, EpisodeRow
from lwd_fleet.data.episode import bag_messages
from lwd_fleet.data.store import LocalStore
from lwd_fleet.deployment import load_deployment, node_specs
from lwd_fleet.domain import PrivateDomain
from lwd_fleet.sim import robot
from lwd_fleet.sim.presets import observation_spec
from lwd_fleet.sim.rollout_worker import RolloutRequest
from lwd_fleet.sim.rollouts import Rollouts, split
from lwd_fleet.supervisor import Supervisor
from lwd_learner.demo_plan import (
    DEMONSTRATION_SEED,
    EVALUATION_SEED,
    HEADLESS_SEED,
    ROLLOUT_SEED,
    DemoPlan,
)
from lwd_learner.learner import Learner, load_policy
from lwd_learner.methods import named
from lwd_learner.report import (
    DeployedVersion,
    EpisodeSource,
    Filmstrip,
    MethodResult,
    OnlineEpisode,
    RunSummary,
    comparisons,
    rates,
    summary_json,
    write_report,
)
from lwd_learner.sim_policy import STEP_S, sim_policy
from lwd_learner.training_run import TrainingRun
from lwd_policy import checkpoint
from lwd_policy.flow_policy import FlowPolicy

_ROBOTS = ("sim_r1", "sim_r2")
_LABELS = {"keypoints": "keypoints", "images": "pixels, trunk pretrained with privileged keypoints"}
_METHODS = {
    "before": "The cloned policy (before)",
    "offline": "Offline learning",
    "after": "Online learning (after)",
    "filtered_bc": "Filtered cloning of the same data",
}
_CURVES = (
    "clone_loss",
    "value_loss",
    "critic_loss",
    "q",
    "entropy",
    "tau",
    "path_kl",
    "auc",
    "action_auc",
    "over_estimate",
)
_FILM_FRAMES = 8


@dataclass
class _Log:
    """What is remembered for the report."""

    stages: list[tuple[str, float]] = field(default_factory=list)
    curves: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)
    phases: list[tuple[float, str]] = field(default_factory=list)
    steps: int = 0
    learn_s: float = 0.0  # seconds spent in DIVL and QAM: what filtered cloning gets, too
    baseline: str = ""  # what filtered cloning had
    online_from: int = 0  # catalog sequence number
    online_began_s: float = 0.0


class Demo:
    """One run in `directory` (must not exist)."""

    def __init__(self, directory: Path, plan: DemoPlan, console: Console) -> None:
        self.directory, self.plan, self.console = directory.absolute(), plan, console
        self.directory.mkdir(parents=True)
        self.store = LocalStore(self.directory / "store")
        self.catalog = Catalog(str(self.directory / "catalog.db"))
        self._spec = observation_spec(plan.observation)
        robots = self.directory / "robots"
        robots.mkdir()
        self._robot_file = robot.write(robots)
        self._log = _Log()

    def run(self) -> RunSummary:
        """All of it; returns what the report shows, after writing it."""
        began = time.monotonic()
        plan = self.plan
        self._demonstrate()
        policy = sim_policy(plan.observation, self.catalog, self.store, plan.observe_every)
        learner = self._learner(policy)
        before = self._clone(learner)
        self._roll_out(before)
        offline = self._learn_offline(learner)
        learner.close()
        after = self._work_and_learn()
        with ExitStack() as beside:  # cloning takes one core
            ours = {"before": before, "offline": offline, "after": after}
            running = {
                name: beside.enter_context(self._evaluation(name, path)) for name, path in ours.items()
            }
            running["filtered_bc"] = beside.enter_context(
                self._evaluation("filtered_bc", self._clone_successes(before), workers=2)
            )
            methods = tuple(self._result(name, rollouts) for name, rollouts in running.items())
        second = self._evaluate_second(after) if plan.second_evaluation_episodes else None
        summary = self._summarise(methods, second, time.monotonic() - began)
        write_report(summary, self.directory / "report.html")
        (self.directory / "summary.json").write_text(json.dumps(summary_json(summary), indent=1) + "\n")
        return summary

    # Stages ------------------------------------------------------------------------------------------

    def _demonstrate(self) -> None:
        plan = self.plan
        episodes = [(plan.task, DEMONSTRATION_SEED + i) for i in range(plan.demonstrations)]
        episodes += [(plan.second_task, DEMONSTRATION_SEED + i) for i in range(plan.second_demonstrations)]
        request = self._request(
            "sim_expert",
            episodes,
            observation_spec=json.loads(self._spec.to_json()),
            observe_every=plan.observe_every,
            shift="",
        )
        self._roll("demonstrations", request, record=True)

    def _clone(self, learner: Learner) -> Path:
        with self._stage("cloning"):
            self._ingest(learner)
            run = TrainingRun(learner, "bc")
            self._train("cloning", self.plan.clone_steps, run.train)
        return self._publish(learner)

    def _roll_out(self, before: Path) -> None:
        episodes = [(self.plan.task, ROLLOUT_SEED + i) for i in range(self.plan.rollouts)]
        request = self._request("sim_rollout", episodes, policy=str(before), policy_version=1)
        self._roll("rollouts of the cloned policy", request, record=True)

    def _learn_offline(self, learner: Learner) -> Path:
        with self._stage("offline learning"):
            self._ingest(learner)
            run = TrainingRun(learner, "offline")
            began = time.monotonic()
            self._train("refit to what succeeded", self.plan.refit_steps, learner.refit)
            self._train("offline", self.plan.offline_steps, run.train)
            self._log.learn_s += time.monotonic() - began
            run.save()
        return self._publish(learner)

    def _work_and_learn(self) -> Path:
        """Robots on the wire and headless ones work; the learner node learns from what they bring and publishes."""
        with self._stage("online: robots work, the learner learns"):
            self._log.online_from = self.catalog.snapshot()[0]
            deployment = load_deployment(self._write_deployment(), self.directory)
            headless = self._request(
                "sim_headless",
                [(self.plan.task, HEADLESS_SEED + i) for i in range(8)],
                follow=True,
                spool=str(self.directory / "spool" / "sim_headless"),
                store=str(self.store.root),
                catalog=str(self.directory / "catalog.db"),
            )
            with (
                PrivateDomain() as domain,
                Supervisor(
                    node_specs(deployment), self.directory, domain.environment, report=self.console.print
                ) as fleet,
                Live(self._table(), console=self.console, refresh_per_second=1) as live,
            ):
                self._wait_for_robots(fleet, live)
                with Rollouts([headless], self.directory / "work") as workers:
                    self._log.online_began_s = time.time()
                    began = time.monotonic()
                    fleet.run(lambda: self._watch(live, workers, began))
            self._log.learn_s += self.plan.online_s
        row = self.catalog.desired_policy()
        assert row is not None
        return Path(row.uri.removeprefix("file://"))

    def _clone_successes(self, before: Path) -> Path:
        """The baseline: clone what succeeded in deployment, from the same start, with the same data for as many seconds."""
        with self._stage("filtered cloning of the same data"):
            policy = load_policy(before)
            learner = self._learner(policy)
            self._ingest(learner, "online")
            successes = named("filtered_bc").draws
            for step in range(50):  # how long a step takes here and now
                if step == 10:
                    began = time.monotonic()
                learner.trainer.clone(
                    learner.replay.sample(256, learner.trainer.sampling, 0.99, selection=successes), 0.0
                )
            steps = int(self._log.learn_s / ((time.monotonic() - began) / 40))
            steps = min(steps, 2 * self.plan.clone_steps)
            began = time.monotonic()
            rate = learner.config.refit_rate
            self._train(
                "filtered cloning", steps, lambda count, look: learner.clone(count, successes, look, rate)
            )
            self._log.baseline = f"{steps} updates in {time.monotonic() - began:.0f} s"
            learner.close()
        return checkpoint.save(self.directory / "baselines", policy)

    def _evaluation(self, name: str, path: Path, workers: int = 1) -> Rollouts:
        episodes = [(self.plan.task, EVALUATION_SEED + i) for i in range(self.plan.evaluation_episodes)]
        request = self._request(f"sim_evaluation_{name}", episodes, policy=str(path), robots=16)
        return Rollouts(split(request, workers), self.directory / "work")

    def _result(self, name: str, rollouts: Rollouts) -> MethodResult:
        with self._stage(f"evaluation: {name}"):
            results = self._collect(f"evaluation: {name}", rollouts, self.plan.evaluation_episodes)
        return MethodResult(name, _METHODS[name], _successes(results))

    def _evaluate_second(self, after: Path) -> MethodResult:
        task, count = self.plan.second_task, self.plan.second_evaluation_episodes
        episodes = [(task, EVALUATION_SEED + i) for i in range(count)]
        request = self._request(f"sim_evaluation_{task}", episodes, policy=str(after), robots=16)
        results = self._roll(f"evaluation: after, {task}", request, record=False)
        return MethodResult(task, f"{task} (multi-stage), after", _successes(results))

    # Parts of stages ---------------------------------------------------------------------------------

    def _learner(self, policy: FlowPolicy) -> Learner:
        return Learner(
            self.directory / "learner",
            self.catalog,
            self.store,
            policy,
            self.plan.learner,
            seed=self.plan.seed,
        )

    def _request(self, robot: str, episodes: list[tuple[str, int]], **other: Any) -> RolloutRequest:
        fields: dict[str, Any] = {"shift": self.plan.shift, **other}
        return RolloutRequest(str(self._robot_file), episodes, robot, **fields)

    def _roll(self, title: str, request: RolloutRequest, record: bool) -> list[dict[str, Any]]:
        if record:
            request = replace(
                request,
                spool=str(self.directory / "spool" / request.robot),
                store=str(self.store.root),
                catalog=str(self.directory / "catalog.db"),
            )
        workers = split(request, 2)
        if record:
            workers = [replace(one, spool=f"{one.spool}_{number}") for number, one in enumerate(workers)]
        with self._stage(title), Rollouts(workers, self.directory / "work") as rollouts:
            return self._collect(title, rollouts, len(request.episodes))

    def _collect(self, title: str, rollouts: Rollouts, total: int) -> list[dict[str, Any]]:
        """The results of all episodes, while they come in."""
        results = []
        with self._bar(title, total) as advance:
            for result in rollouts:
                results.append(result)
                won = sum(one["success"] for one in results)
                advance(len(results), f"{won / len(results):.2f} succeed")
        return results

    def _ingest(self, learner: Learner, source: Any = "offline") -> None:
        with self._bar("ingest", max(1, self.catalog.snapshot()[0] - learner.snapshot)) as advance:
            result = learner.ingest(source, lambda done, total: advance(done, ""))
        for text in result.refused:
            self.console.print(f"[yellow]not usable[/] {text}")

    def _train(self, phase: str, steps: int, train: Any) -> None:
        self._log.phases.append((float(self._log.steps), phase))
        every = max(1, steps // 60)
        with self._bar(phase, steps) as advance:

            def look(step: int, metrics: dict[str, float]) -> None:
                self._log.steps += 1
                if step % every == 0:
                    for name in _CURVES:
                        if name in metrics:
                            xs, ys = self._log.curves.setdefault(name, ([], []))
                            xs.append(float(self._log.steps))
                            ys.append(metrics[name])
                loss = metrics.get("clone_loss", metrics.get("critic_loss", 0.0))
                advance(step, f"loss {loss:.4f}")

            train(steps, look)

    def _publish(self, learner: Learner) -> Path:
        version = learner.publish()
        row = self.catalog.policy(version)
        return Path(row.uri.removeprefix("file://"))

    def _write_deployment(self) -> Path:
        plan = self.plan
        common = {
            "kind": "sim",
            "robot_file": str(self._robot_file),
            "tasks": [plan.task],
            "shift": plan.shift,
        }
        content = {
            "name": "demo",
            "rates": {"policy_step_hz": 1 / STEP_S, "output_hz": 50.0},
            "robots": [{"name": name, **common} for name in _ROBOTS],
            "learner": {
                "publish_every": plan.publish_every,
                "refit_every": plan.refit_every,
                "refit_steps": plan.refit_steps,
                "policy_rows": plan.policy_rows,
                "kl_budget": plan.kl_budget,
                "critic_rate": plan.critic_rate,
                "tau_ramp_steps": plan.tau_ramp_steps,
            },
        }
        path = self.directory / "deployment.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        return path

    def _wait_for_robots(self, fleet: Supervisor, live: Live) -> None:
        """Until every robot has brought an episode: start-up is not time to learn in."""
        deadline = time.monotonic() + 120.0

        def ready() -> bool:
            live.update(self._table())
            seen = {row.robot for row in self._online()}
            return seen >= set(_ROBOTS) or time.monotonic() > deadline

        fleet.run(ready)

    def _watch(self, live: Live, workers: Rollouts, began: float) -> bool:
        workers.finished()
        live.update(self._table())
        time.sleep(0.5)
        return time.monotonic() - began > self.plan.online_s

    def _online(self) -> list[EpisodeRow]:
        return self.catalog.episodes_since(self._log.online_from)

    def _table(self) -> Table:
        """Robots, episodes, versions, success so far."""
        table = Table("robot", "episodes", "last outcome", "its policy", "success (last 10)", title="online")
        rows: dict[str, list[EpisodeRow]] = {name: [] for name in (*_ROBOTS, "sim_headless")}
        for row in self._online():
            rows.setdefault(row.robot, []).append(row)
        for name, episodes in rows.items():
            last = episodes[-1] if episodes else None
            recent = [one.outcome == "success" for one in episodes[-10:]]
            table.add_row(
                name,
                str(len(episodes)),
                last.outcome if last else "",
                str(last.policy_version) if last else "",
                f"{sum(recent) / len(recent):.2f}" if recent else "",
            )
        desired = self.catalog.desired_policy()
        table.caption = f"fleet runs towards version {desired.version if desired else '-'}"
        return table

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._log.stages.append((name, time.monotonic() - began))

    @contextmanager
    def _bar(self, title: str, total: int) -> Iterator[Any]:
        columns = (
            TextColumn("{task.description:<34}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(title, total=total, note="")
            yield lambda done, note: progress.update(task, completed=done, note=note)

    # Report ------------------------------------------------------------------------------------------

    def _summarise(
        self, methods: tuple[MethodResult, ...], second: MethodResult | None, wall_s: float
    ) -> RunSummary:
        rows = self.catalog.episodes_since(0)
        online = self._online()
        count, won = (
            Counter(row.robot for row in rows),
            Counter(row.robot for row in rows if row.outcome == "success"),
        )
        ran = {row.version: set[str]() for row in self.catalog.policies()}
        for row in rows:
            if row.policy_version in ran:
                ran[row.policy_version].add(row.robot)
        return RunSummary(
            title="A fleet that learns while it is deployed",
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            observation=_LABELS[self.plan.observation],
            methods=methods,
            command="lwd demo",
            commit=_commit(),
            machine=_machine(),
            wall_s=wall_s,
            curves=self._log.curves,
            phases=tuple(self._log.phases),
            online=tuple(
                OnlineEpisode(
                    (row.committed_s - self._log.online_began_s) / 60,
                    row.robot,
                    row.outcome == "success",
                    str(row.policy_version),
                )
                for row in online
            ),
            filmstrips=self._filmstrips(online),
            versions=tuple(
                DeployedVersion(
                    str(row.version),
                    row.digest,
                    str(row.parent or ""),
                    f"{row.snapshot_n} episodes",
                    datetime.fromtimestamp(row.created_s, timezone.utc).strftime("%H:%M:%S"),
                    tuple(sorted(ran[row.version])),
                )
                for row in self.catalog.policies()
            ),
            sources=tuple(
                EpisodeSource(name, "ros" if name in _ROBOTS else "headless", number, won[name])
                for name, number in sorted(count.items())
            ),
            stages=tuple(self._log.stages),
            multi_stage=second,
            notes=(
                f"Every policy is evaluated under the deployment shift '{self.plan.shift}', which the demonstrations "
                "did not have.",
                f"Filtered cloning had the same episodes and {self._log.baseline}; learning had "
                f"{self._log.learn_s:.0f} s.",
            ),
        )

    def _filmstrips(self, online: list[EpisodeRow]) -> tuple[Filmstrip, ...]:
        """One success and one failure of a robot on the wire, as its overview camera saw them."""
        strips = []
        for outcome in ("success", "failure"):
            rows = [row for row in online if row.robot in _ROBOTS and row.outcome == outcome]
            if rows:
                row = rows[-1]
                frames = self._frames(row)
                strips.append(Filmstrip(f"{row.robot}: {row.instruction}", outcome == "success", frames))
        return tuple(strips)

    def _frames(self, row: EpisodeRow) -> tuple[tuple[str, bytes], ...]:
        (file,) = row.summary.files
        bag = self.directory / "work" / file.name
        if not bag.exists():
            self.store.get(file.sha256, bag)
        images = list(bag_messages(bag, "camera_top/image_raw/compressed"))
        if not images:
            return ()
        chosen = images[:: max(1, len(images) // _FILM_FRAMES)][:_FILM_FRAMES]
        first = images[0].log_time_ns
        return tuple((f"{(m.log_time_ns - first) / 1e9:.1f} s", bytes(m.message.data)) for m in chosen)


def _successes(results: list[dict[str, Any]]) -> dict[int, bool]:
    """Whether each scene's episode succeeded, by its seed."""
    return {int(result["request"]["seed"]): bool(result["success"]) for result in results}


def print_summary(summary: RunSummary, console: Console, report: Path) -> None:
    """The table that the demonstration ends with."""
    table = Table("policy", "success", "95 % interval", title=f"{summary.title} ({summary.observation})")
    estimates = rates(summary)
    for method in summary.methods:
        estimate = estimates[method.name]
        table.add_row(method.label, f"{estimate.value:.3f}", f"{estimate.low:.3f} to {estimate.high:.3f}")
    console.print(table)
    for name, difference in comparisons(summary).items():
        verdict = "" if difference.excludes_zero else "  (no difference shown)"
        console.print(
            f"{name}: {difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]{verdict}"
        )
    console.print(f"{summary.wall_s / 60:.1f} minutes; report: {report}")


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def _machine() -> str:
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        model = names[0] if names else model
    return f"{os.cpu_count()} cores, {model}, no GPU used"
