# SPDX-License-Identifier: Apache-2.0
"""The learner: takes committed episodes in, trains, and publishes policy versions. ROS-free.

The node, the command line and the demonstration all run this one object; what it does between two calls is written
down in the catalog (cursor, versions), the replay's ledger and the trainer's state.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rosbags.serde import SerdeError

from lwd_fleet.data.bag_scan import BROKEN
from lwd_fleet.data.catalog import Catalog, EpisodeRow, PolicyRow
from lwd_fleet.data.episode import RecordedMessage, bag_messages
from lwd_fleet.data.store import BlobDamaged, BlobMissing, BlobStore
from lwd_fleet.data.summary import OUTCOMES
from lwd_learner.batch import Batch
from lwd_learner.descent import NonFiniteLoss
from lwd_learner.extraction.headed import deployed
from lwd_learner.gate import CriticCheck, examine
from lwd_learner.image_encoder import Sight
from lwd_learner.ingest_journal import Arrival, IngestJournal
from lwd_learner.loss_mix import LossMix, LossMixConfig, loss_sums
from lwd_learner.methods import DEFAULT, named
from lwd_learner.non_finite import save_evidence
from lwd_learner.ranks import ALONE, Ranks
from lwd_learner.replay import Selection
from lwd_learner.replay_episode import Camera, ReplayEpisode, ReplayLayout, Source
from lwd_learner.schedule import Schedule
from lwd_learner.selections import DEMONSTRATIONS, DEPLOYED
from lwd_learner.shared_replay import SharedReplay
from lwd_learner.trainer import Trainer, TrainerConfig
from lwd_learner.training_log import LOOK_EVERY, TrainingLog
from lwd_learner.transitions import (
    EpisodeTrace,
    EpisodeUnusable,
    episode_rows,
    raw_actions,
    read_trace,
)
from lwd_policy import checkpoint
from lwd_policy.action import ActionSpec
from lwd_policy.flow_policy import FlowPolicy
from lwd_policy.observation import ObservationError

_EPISODE_TOPICS = ("episode", "executed_action", "policy/action_chunk")
_NOTE_EVERY = (
    16  # episodes between two notes of how far ingest has come, for the catalog and for waiting ranks
)
_DONE, _MORE = 0, 1


@dataclass(frozen=True)
class LearnerConfig:
    """What is decided about learning besides the trainer's own settings."""

    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    clone_rate: float = 2e-3  # peak learning rate of cloning; half of it takes twice the updates
    refit_rate: float = 3e-4  # peak learning rate of cloning deployed successes, of which there are few
    clone_schedule: Schedule = field(default_factory=lambda: Schedule("cosine", warm_up=100))  # of both
    n_step: Mapping[str, int] = field(default_factory=dict)  # chunks of an offline window, by task; else 1
    stride: int = 5  # policy steps between the decisions of a demonstrator
    task_weights: Mapping[str, float] = field(default_factory=dict)  # rows of each, relatively; else 1
    held_out: float = 0.1  # share of episodes that only judge the critic
    check_every: int = 50  # steps between two looks at the critic
    over_estimate_max: float = 0.05  # tau_base is raised only while Q is no more above the outcome (4.1b)
    loss_mix: LossMixConfig | None = (
        None  # shares of online rows that follow the losses; None: one to one (4.17)
    )
    method: str = DEFAULT  # one of `methods.METHODS`; it changes the trainer's settings to its own
    draws: Selection | None = None  # the transitions to learn from; None: those of the method

    def __post_init__(self) -> None:
        for task, weight in self.task_weights.items():
            if not 0 < weight < math.inf:
                raise ValueError(f"the weight of task {task} is {weight}; it must be a positive number")


@dataclass
class Ingested:
    """What one call of `ingest` brought."""

    episodes: int = 0
    transitions: int = 0
    refused: list[str] = field(default_factory=list)


class Learner:
    """Owns replay, trainer and policy of one run directory."""

    def __init__(
        self,
        run_dir: Path,
        catalog: Catalog,
        store: BlobStore,
        policy: FlowPolicy,
        config: LearnerConfig | None = None,
        device: str = "cpu",
        seed: int = 0,
        name: str = "learner",
        ranks: Ranks = ALONE,
    ) -> None:
        """Takes in episodes from where an earlier process of the same run directory stopped. What that one learned,
        `TrainingRun` brings back.

        ranks: that train together, each with a learner like this one; all call `ingest`, `clone`, `refit`, `learn` and
        `publish` at the same moments. Only the first one's catalog and store are used.
        """
        self.config = config or LearnerConfig()
        self.method = named(self.config.method)
        self.policy = policy.to(device)
        self.policy.trunk.eval()  # as in a loaded checkpoint: in training mode its features differ in the last digits
        self.catalog = catalog
        self.run_dir = run_dir
        self._store = store
        self._name = name
        self.ranks = ranks
        action, history = policy.action_spec, policy.observation_spec.history
        self._cameras = cameras_of(policy) if self.config.trainer.critic.features == "own" else ()
        self.trainer = Trainer(
            policy.expert
            if ranks.size == 1
            else copy.deepcopy(policy.expert),  # ranks may keep pieces of theirs
            policy.context_dim,
            action.horizon,
            action.dim,
            replace(self.method.adapt(self.config.trainer), step_s=action.step_s),
            device,
            seed,
            ranks,
            Sight(history, self._cameras),
        )
        layout = ReplayLayout(
            policy.feature_dim,
            action.horizon,
            action.dim,
            history,
            feature_key(policy),
            cameras=self._cameras,
        )
        self._shared = SharedReplay(run_dir / "replay", layout, ranks)
        self._shared_held_out = SharedReplay(run_dir / "held_out", layout, ranks)
        self.replay, self.held_out = self._shared.whole, self._shared_held_out.whole
        self.check = CriticCheck()
        self._next_check = 0  # the trainer's step; counted over calls of `learn`, however short these are
        self.phases: dict[str, int] = {}  # the trainer's step at which each began
        self.log = TrainingLog(run_dir / "tensorboard")
        self._mix = LossMix(self.config.loss_mix) if self.config.loss_mix is not None else None
        self._journal = IngestJournal(run_dir / "ingests.jsonl") if ranks.first else None
        if self._journal is not None:
            self._journal.forget_unless_stored(self.replay.stored, self.held_out.stored)
        self._repeats = False  # whether the trainer's steps are those that the journal speaks of
        self._next_arrival = -1  # the step from which on more episodes count, while lost steps are repeated
        # Where the replay was moved away, as one of an older format has to be, everything is ahead again.
        self.snapshot = catalog.cursor(name) if self.replay.stored + self.held_out.stored else 0
        self.version = max((row.version for row in catalog.policies()), default=-1)

    def close(self) -> None:
        """Release the replays and the log."""
        self.log.close()
        self._shared.close()
        self._shared_held_out.close()

    # Data --------------------------------------------------------------------------------------------

    def ingest(
        self,
        source: Source,
        progress: Callable[[int, int], None] = lambda done, total: None,
        limit: int | None = None,
    ) -> Ingested:
        """Take in all episodes committed since the last call, or the first `limit` of them. An episode that cannot
        be used is noted in the catalog's quarantine and passed over; it never stops the rest. The first rank does it, for
        all; the result is empty on the others."""
        result = Ingested()
        if self.ranks.first:
            for _ in self._ingest(source, progress, limit, result):
                self.ranks.newest(_MORE)
        while self.ranks.newest(_DONE) == _MORE:  # what the first rank says; one long wait would time out
            pass
        self._agree()
        return result

    def _ingest(
        self, source: Source, progress: Callable[[int, int], None], limit: int | None, result: Ingested
    ) -> Iterator[None]:
        """Yields now and then, when what was taken in so far is never taken in again."""
        rows = self.catalog.episodes_since(self.snapshot, limit)
        if rows and self._journal is not None:
            stored = self._shared.written.stored, self._shared_held_out.written.stored
            self._journal.note(Arrival(self.trainer.steps, *stored))
        for done, row in enumerate(rows):
            try:
                episode = ReplayEpisode.from_rows(episode_rows(self.trace(row), self.policy), source)
                shared = self._shared_held_out if self._is_held_out(row.episode_id) else self._shared
                if shared.written.append(episode):
                    result.episodes += 1
                    result.transitions += len(episode.transitions)
            except (
                EpisodeUnusable,
                ObservationError,
                BlobMissing,
                BlobDamaged,
                SerdeError,
                *BROKEN,
            ) as error:
                result.refused.append(f"{row.episode_id}: {error}")
                self.catalog.quarantine(row.episode_id, f"not ingested: {error}", "")
            self.snapshot = row.seq
            progress(done + 1, len(rows))
            if (done + 1) % _NOTE_EVERY == 0 or done + 1 == len(rows):
                self.catalog.set_cursor(self._name, self.snapshot)
                yield

    def _agree(self) -> None:
        """All ranks see the same episodes from here on: those that had come in when the trainer first was at this step."""
        follows = self._repeats and self._journal is not None
        arrival = self._journal.after(self.trainer.steps) if follows and self._journal is not None else None
        if arrival is not None or (self._next_arrival >= 0 and self.ranks.first):
            self._shared.written.see(None if arrival is None else arrival.replay)
            self._shared_held_out.written.see(None if arrival is None else arrival.held_out)
        self._next_arrival = self.ranks.newest(-1 if arrival is None else arrival.step)
        self._shared.agree()
        self._shared_held_out.agree()

    def _catch_up(self) -> None:
        """Before an update: what came in at this step, when it was first taken, counts from here on."""
        if 0 <= self._next_arrival <= self.trainer.steps:
            self._agree()

    def trace(self, row: EpisodeRow) -> EpisodeTrace:
        """What happened in a committed episode, with the verdict that counts. Raises like `fetch_trace`."""
        trace = fetch_trace(self._store, row, self.policy, self.config.stride, self._cameras)
        verdict = self.catalog.labels(row.episode_id)
        if verdict:
            trace.outcome = OUTCOMES.index(verdict[-1].outcome)
        return trace

    def _is_held_out(self, episode_id: str) -> bool:
        """The same for every learner and every restart: decided by the name."""
        return int(hashlib.sha256(episode_id.encode()).hexdigest()[:8], 16) < self.config.held_out * 2**32

    # Training ----------------------------------------------------------------------------------------

    def clone(
        self,
        steps: int,
        selection: Selection = DEMONSTRATIONS,
        progress: Callable[[int, dict[str, float]], None] = lambda step, metrics: None,
        peak_rate: float | None = None,
        done: int = 0,
        planned: int | None = None,
    ) -> None:
        """Behaviour cloning of the selected transitions; the learning rate rises briefly to its peak (None:
        `clone_rate`) and falls to zero. These steps follow `done` others of `planned` in all (None: they are all)."""
        self._agree()
        peak = self.config.clone_rate if peak_rate is None else peak_rate
        for step in range(steps):
            self._catch_up()
            share = self.config.clone_schedule.share(done + step, steps if planned is None else planned)
            batch = self._draw(selection)
            with self._kept(batch):
                metrics = self.trainer.clone(batch, peak * share)
            self.log.add(self.trainer.steps, metrics)
            progress(step + 1, metrics)

    def refit(
        self,
        steps: int,
        progress: Callable[[int, dict[str, float]], None] = lambda step, metrics: None,
    ) -> bool:
        """Clone what succeeded in deployment, corrections included (`DEPLOYED`), and make the result the reference: a new
        phase. algorithm.md 4.14.

        A tilt cannot leave the support of its reference, and a reference that was cloned elsewhere hardly covers what
        succeeds under a shift. Demonstrations are left out: they show what succeeds without it; but tasks that have
        nothing else keep theirs, or they would be forgotten. False, with nothing changed, if nothing of a deployment
        succeeded yet.
        """
        self._agree()
        if not self.replay.count(replace(DEPLOYED, otherwise=None)):
            return False
        self.clone(steps, DEPLOYED, progress, self.config.refit_rate)
        self.trainer.freeze_reference()
        return True

    def learn(
        self, steps: int, progress: Callable[[int, dict[str, float]], None] = lambda step, metrics: None
    ) -> None:
        """`steps` of the method on the replay: the LEARNER step of algorithm.md 3, or of cloning at a constant rate."""
        self._agree()
        for step in range(steps):
            self._catch_up()
            metrics = self._learn_judged() if self.method.judges else self._learn_cloned()
            self.log.add(self.trainer.steps, metrics)
            progress(step + 1, metrics)

    def _learn_cloned(self) -> dict[str, float]:
        batch = self._draw(self.config.draws or self.method.draws, self.config.n_step)
        with self._kept(batch):
            return self.trainer.clone(batch)

    def _learn_judged(self) -> dict[str, float]:
        if self.trainer.steps >= self._next_check:
            self.check = self._check_critic()
            self._next_check = self.trainer.steps + self.config.check_every
        batch = self._draw(
            self.config.draws or self.method.draws, self.config.n_step, images=bool(self._cameras)
        )
        with self._kept(batch):
            metrics = self.trainer.learn(
                batch,
                update_policy=self.check.knows_something,
                raise_tau=self.check.over_estimate <= self.config.over_estimate_max,
            )
        if self._mix is not None:
            names = self.replay.tasks
            sums = loss_sums(len(names), batch.task, batch.online, self.trainer.critic_losses(batch).cpu())
            self._mix.add(names, self.ranks.total(sums.to(self.trainer.device)))
        if self.trainer.steps % LOOK_EVERY == 0:
            self.log.look(self.trainer, batch)
        return metrics | asdict(self.check)

    def _draw(
        self, selection: Selection, n_step: Mapping[str, int] | None = None, images: bool = False
    ) -> Batch:
        """This rank's rows of a minibatch."""
        return self._shared.part.sample(
            self.ranks.share(self.config.trainer.batch),
            self.ranks.sampling(self.trainer.sampling),
            self.trainer.config.gamma,
            n_step=dict(n_step or {}),
            selection=selection,
            images=images,
            online_share=None if self._mix is None else self._mix.shares(),
            task_weights=self.config.task_weights,
        )

    @contextmanager
    def _kept(self, batch: Batch) -> Iterator[None]:
        """Keep the batch of a step whose loss is no number, and say where."""
        try:
            yield
        except NonFiniteLoss as error:
            spans = self.replay.spans  # in the order of rows
            first = np.array([first for _, first, _ in spans], np.int64)
            episodes = [
                spans[at][0] for at in np.searchsorted(first, batch.row.cpu().numpy(), side="right") - 1
            ]
            record = {"error": str(error), "metrics": self.trainer.means}
            folder = self.run_dir / "non_finite"
            if not self.ranks.first:
                folder /= f"rank_{self.ranks.index}"
            path = save_evidence(folder, self.trainer.steps, batch, episodes, record)
            raise NonFiniteLoss(f"{error}; its batch is kept in {path}") from error

    def _check_critic(self) -> CriticCheck:
        """All ranks judge all held-out episodes: their verdicts may differ in the last digits, where they compute
        differently, and the mean decides."""
        found = examine(self.trainer, self.held_out, images=bool(self._cameras))
        if len(found.q):
            self.log.judge(self.trainer.steps, found.q, found.outcome)
            return CriticCheck(**self.ranks.means(asdict(found.check)))
        return found.check

    # Going on after an end ---------------------------------------------------------------------------

    def begin_run(self) -> None:
        """From here on, states are saved that a later process may resume from. All episodes that are there count."""
        if self._journal is not None:
            self._journal.clear()
        self._take_up()

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved `state`, after the trainer was given its own: at each step, draw from what was there when
        this step was taken for the first time, should the process that took it have died."""
        self.phases = dict(state["phases"])
        self.check = CriticCheck(**state["check"])
        self._next_check = state["next_check"]
        if self._mix is not None:
            self._mix.restore(state["mix"])
        self.log.restore(state["log"])
        self._take_up()

    @property
    def state(self) -> dict[str, Any]:
        """What decides the next update, and is neither the trainer's nor in the replay or its journal."""
        return {
            "phases": self.phases,
            "check": asdict(self.check),
            "next_check": self._next_check,
            "mix": [] if self._mix is None else self._mix.state,
            "log": self.log.state,
        }

    def _take_up(self) -> None:
        self._repeats = True
        self._agree()
        self.log.begin(self.trainer.steps, writes=self.ranks.first)

    # Policies ----------------------------------------------------------------------------------------

    def publish(self, metrics: Mapping[str, float] | None = None) -> int:
        """Make the present policy the version that the fleet should run: a new one, unless the newest is this very
        policy (the critic did not let it change). Returns its number. The first rank does it, for all."""
        self.trainer.actor.write_expert(self.policy.expert)
        if self.ranks.first:
            self._publish(metrics or {})
        self.version = self.ranks.newest(self.version)
        return self.version

    def _publish(self, metrics: Mapping[str, float]) -> None:
        policy = deployed(self.policy, self.trainer.extraction)
        if self.version < 0 or not checkpoint.holds(_folder(self.catalog.policy(self.version)), policy):
            snapshot = (self.snapshot, self.catalog.snapshot()[1])
            parent = self.version if self.version >= 0 else None
            origin: dict[str, Any] = {
                "parent": parent,
                "snapshot": snapshot,
                "learner_steps": self.trainer.steps,
            }
            path = checkpoint.save(self.run_dir.parent / "policies", policy, origin)
            finite = {name: float(value) for name, value in metrics.items() if np.isfinite(value)}
            self.version = self.catalog.register_policy(path.name, path.as_uri(), snapshot, parent, finite)
        if (
            self.catalog.policy(self.version).state == "candidate"
        ):  # new, or its learner died before the next line
            self.catalog.set_policy_state(self.version, "active")


def fetch_trace(
    store: BlobStore, row: EpisodeRow, policy: FlowPolicy, stride: int, cameras: Sequence[Camera] = ()
) -> EpisodeTrace:
    """What happened in a committed episode, as this policy sees it, with the images of these cameras. The blob's digest
    says that it is the bag which was checked before it was committed. Raises EpisodeUnusable, BlobMissing, BlobDamaged."""
    (file,) = row.summary.files
    with tempfile.TemporaryDirectory(prefix="lwd-") as folder:
        bag = Path(folder) / file.name
        store.get(file.sha256, bag)
        return trace_episode(row.episode_id, bag_messages(bag, *topics_of(policy)), policy, stride, cameras)


def trace_episode(
    episode_id: str,
    messages: Iterable[RecordedMessage],
    policy: FlowPolicy,
    stride: int,
    cameras: Sequence[Camera] = (),
) -> EpisodeTrace:
    """The trace of recorded messages (of `topics_of`), as this policy sees it. Raises EpisodeUnusable."""
    read = ((message.topic, message.log_time_ns, message.message) for message in messages)
    names = policy.action_spec.embodiment.joint_names
    return read_trace(episode_id, read, policy.observation_spec, names, stride, [one.name for one in cameras])


def cameras_of(policy: FlowPolicy) -> tuple[Camera, ...]:
    """Those that the policy's observation has, at the size at which it looks at them."""
    images = (stream for stream in policy.observation_spec.streams if stream.kind == "image")
    return tuple(Camera(stream.name, *stream.shape[:2]) for stream in images)


def topics_of(policy: FlowPolicy) -> tuple[str, ...]:
    """What the learner reads of an episode."""
    return tuple(sorted({*_EPISODE_TOPICS, *(stream.topic for stream in policy.observation_spec.streams)}))


def _folder(version: PolicyRow) -> Path:
    return Path(version.uri.removeprefix("file://"))


def fit_actions(traces: Iterable[EpisodeTrace], action: ActionSpec) -> ActionSpec:
    """The action spec with the normalisation of these demonstrations. Kept fixed ever after: features, critic and
    every policy version of the run speak in it."""
    raw: list[NDArray[np.float64]] = []
    valid: list[NDArray[np.bool_]] = []
    task: list[NDArray[np.int64]] = []
    numbers: dict[str, int] = {}
    for trace in traces:
        chunks, planned = raw_actions(trace, action)
        raw.append(chunks)
        valid.append(np.arange(action.horizon) < planned[:, None])
        task.append(np.full(len(chunks), numbers.setdefault(trace.task, len(numbers))))
    return action.with_statistics(np.concatenate(raw), np.concatenate(valid), np.concatenate(task))


def feature_key(policy: FlowPolicy) -> str:
    """Digest of all that features and normalised actions depend on: trunk, observation and action spec."""
    hasher = hashlib.sha256()
    for name, tensor in sorted(policy.trunk.state_dict().items()):
        hasher.update(name.encode())
        hasher.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    for text in (
        policy.observation_spec.to_json(),
        policy.action_spec.to_json(),
        json.dumps(policy.trunk.config.to_json()),
    ):
        hasher.update(text.encode())
    return hasher.hexdigest()


def load_policy(path: Path, device: str | torch.device = "cpu") -> FlowPolicy:
    """A policy to go on training from: the flow. A head belongs to the critic that trained it, and the trainer has its
    own. Raises CheckpointRefused."""
    return checkpoint.load(path, device=device)[0].with_head(None)
