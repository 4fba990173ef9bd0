# SPDX-License-Identifier: Apache-2.0
"""The replay: chunk transitions of all episodes in memory-mapped columns, with a ledger that says what counts.

A directory holds the columns `features.f32` and `previous.i64` (observation points, and the point before in the
context of each), `actions.f32` and `transitions.bin` (chunk starts), `spans.bin` (rows of one episode by one author),
with cameras `images.bin` (encoded, as recorded) and `image_places.i64` (where those of a point are), each in segments of a
fixed size, and `ledger.sqlite3`. Episodes are appended as a whole: columns first, synced, then
the ledger. What a crash leaves beyond the ledger is written over.

One process writes (`Replay` holds a lock on the directory). Any number read (`ReplayReader`), each as much of the
ledger as it likes. Opening touches nothing that is as long as the replay.
"""

from __future__ import annotations

import copy
import fcntl
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lwd_fleet.data.files import make_directory
from lwd_learner.batch import Batch
from lwd_learner.column import Column
from lwd_learner.divl import chunk_reward, n_step_window
from lwd_learner.ledger import Extent, Ledger, Place, ReplayMismatch, ReplayMissing
from lwd_learner.replay_episode import TRANSITION, ReplayEpisode, ReplayLayout, pack_images
from lwd_learner.replay_index import EVERYTHING, SPAN, WHOLE, ReplayIndex, Selection, Shard
from lwd_policy.observation import Stream, decode_image

__all__ = [
    "EVERYTHING",
    "Replay",
    "ReplayEmpty",
    "ReplayLocked",
    "ReplayMismatch",
    "ReplayMissing",
    "ReplayReader",
    "Selection",
    "Shard",
]

_Reader = TypeVar("_Reader", bound="ReplayReader")


class ReplayLocked(Exception):
    """Another process writes to this replay."""


class ReplayEmpty(Exception):
    """No transition fits what was asked for."""


class ReplayReader:
    """Draws minibatches from a replay as it was when so many episodes were stored. Takes no lock; not thread-safe.

    Readers that see equally many see the same rows, whatever is appended meanwhile.
    """

    def __init__(self, directory: Path, stored: int | None = None) -> None:
        """Open and `see(stored)`. Raises ReplayMissing, ReplayMismatch, ColumnTooShort."""
        with ExitStack() as opening:
            ledger = opening.enter_context(closing(Ledger.read(directory)))
            self._begin(directory, ledger)
            self.see(stored)
            self._resources = opening.pop_all()

    def _begin(self, directory: Path, ledger: Ledger) -> None:
        self.layout = layout = ledger.layout
        self._ledger = ledger
        self._shard = WHOLE
        self._seen = 0
        self._extent = Extent()
        self._rows = 0
        self._index: ReplayIndex | None = (
            None  # made when first asked, and again when episodes are superseded
        )

        def column(name: str, dtype: np.dtype[Any], *shape: int) -> Column:
            return Column(directory / name, dtype, shape, layout.segment_bytes)

        self._features = column("features.f32", np.dtype("f4"), layout.feature_dim)
        self._previous = column("previous.i64", np.dtype("i8"))
        self._actions = column("actions.f32", np.dtype("f4"), layout.horizon, layout.action_dim)
        self._transitions = column("transitions.bin", TRANSITION)
        self._spans = column("spans.bin", SPAN)
        self._images = column("images.bin", np.dtype("u1"))
        self._image_places = column("image_places.i64", np.dtype("i8"), max(1, len(layout.cameras)), 2)

    def close(self) -> None:
        """Release the files."""
        self._resources.close()

    def __enter__(self: _Reader) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What is there -----------------------------------------------------------------------------------

    @property
    def stored(self) -> int:
        """Episodes of the ledger, those that later ones replaced included: it only grows."""
        return self._ledger.stored

    def fingerprint(self, stored: int) -> int:
        """Of the contents of its first `stored` episodes and their order, 56 bits: two replays with the same one have the
        same rows at the same places."""
        return self._ledger.fingerprint(stored)

    @property
    def seen(self) -> int:
        """How many of them this reader sees."""
        return self._seen

    def see(self, stored: int | None = None) -> None:
        """Count only the ledger's first `stored` episodes, as when there were no more; None: all that there are now.
        Raises ReplayMissing, ColumnTooShort."""
        stored = self._ledger.stored if stored is None else stored
        before, after = self._extent, self._ledger.extent(stored)
        for column, first, end in (
            (self._features, before.points, after.points),
            (self._previous, before.points, after.points),
            (self._actions, before.rows, after.rows),
            (self._transitions, before.rows, after.rows),
            (self._spans, before.spans, after.spans),
            (self._images, before.image_bytes, after.image_bytes),
            (self._image_places, before.points, after.points if self.layout.cameras else 0),
        ):
            column.require(first, end)
        if self._index is not None:
            gone = self._ledger.superseded(stored, since=self._seen)
            if stored < self._seen or (gone < self._seen).any():
                self._index = None
            else:
                self._index.extend(self._counting(before.spans, after.spans, gone))
        self._seen, self._extent = stored, after
        self.tasks = self._ledger.tasks(stored)
        self._rows = after.rows - self._ledger.superseded_rows(stored)

    def shard(self: _Reader, index: int, count: int) -> _Reader:
        """The same replay, drawing from one of `count` parts of the episodes only. Every part has episodes of every
        task and source; those of which there are fewer than parts, all share. It sees what this reader sees now, until
        it is told otherwise itself; it is closed with this reader."""
        part = copy.copy(self)
        part._shard = Shard(index, count)
        part._index = None
        part._resources = ExitStack()
        return part

    def __len__(self) -> int:
        """Transitions that count, in all shards."""
        return self._rows

    @property
    def episode_ids(self) -> frozenset[str]:
        """Episodes that count, in all shards."""
        return frozenset(episode_id for episode_id, _, _ in self.spans)

    @property
    def spans(self) -> list[tuple[str, int, int]]:
        """(episode id, first row, rows) of the episodes that count, in the order of time inside each."""
        return self._ledger.episodes(self._seen)

    def count(self, selection: Selection = EVERYTHING) -> int:
        """Transitions in a selection."""
        return self._indexed().count(selection, self._shard)

    def rows(self, selection: Selection = EVERYTHING) -> NDArray[np.int64]:
        """All rows of a selection, for evaluation. [N] int64."""
        return self._indexed().rows(selection, self._shard)

    def transitions(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """[B] TRANSITION of the given rows, [B] int64."""
        return self._transitions.gather(rows)

    # Minibatches -------------------------------------------------------------------------------------

    def sample(
        self,
        size: int,
        generator: torch.Generator,
        gamma: float,
        n_step: int | Mapping[str, int] = 1,
        selection: Selection = EVERYTHING,
        online_share: Mapping[str, float] | None = None,
        task_weights: Mapping[str, float] | None = None,
        images: bool = False,
    ) -> Batch:
        """Draw `size` transitions with replacement. algorithm.md 4.17.

        Of each task in proportion to `task_weights` (by name, positive, else 1); inside a task, where both have rows, online
        with the chance `online_share` (by task name, else .5) and offline otherwise. gamma: per executed step. n_step: chunks of the window of offline rows (by
        task name if a mapping, else 1); online windows are one chunk. images: with those of `layout.cameras`, decoded
        now; by far the longest part. Raises ReplayEmpty.
        """
        # Always three draws per row, so that the random stream does not depend on what the replay holds.
        uniform = torch.rand(3, size, generator=generator, dtype=torch.float64).numpy()
        share = np.array([(online_share or {}).get(name, 0.5) for name in self.tasks])
        weights = np.array([(task_weights or {}).get(name, 1.0) for name in self.tasks])
        rows = self._indexed().draw(selection, self._shard, uniform, share, weights)
        if len(rows) < size:
            raise ReplayEmpty(
                f"no transition for {selection}; the replay holds {len(self)} in {len(self.spans)} episodes"
            )
        return self.batch(rows, gamma, n_step, images)

    def batch(
        self,
        rows: NDArray[np.int64],
        gamma: float,
        n_step: int | Mapping[str, int] = 1,
        images: bool = False,
    ) -> Batch:
        """The given rows, [B] int64, in the n-step view. Nothing is read of the chunks inside a window but their
        lengths, rewards and ends."""
        if len(rows) and (rows.min() < 0 or rows.max() >= self._extent.rows):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of a replay that has {self._extent.rows}")
        first = self._transitions.gather(rows)
        online, task = first["online"], first["task"].astype(np.int64)
        if isinstance(n_step, int):
            window = np.where(online, 1, n_step)
        else:
            by_task = np.array([n_step.get(name, 1) for name in self.tasks])
            window = np.where(online, 1, by_task[task])
        chain, table = self._chain(rows, first, int(window.max()))
        executed = torch.from_numpy(table["executed"].astype(np.int64))
        # A window ends where another author acts (policy and human would be mixed) and where nothing follows.
        other = np.zeros_like(chain, dtype=np.bool_)
        other[:, :-1] = (table["author"][:, 1:] != table["author"][:, :-1]) | (chain[:, 1:] == chain[:, :-1])
        cut = table["cut"] | other | (np.arange(chain.shape[1]) >= window[:, None] - 1)
        view = n_step_window(
            chunk_reward(torch.from_numpy(table["reward"].copy()), executed, gamma),
            executed,
            torch.from_numpy(table["done"].copy()),
            torch.from_numpy(cut),
            gamma,
        )
        next_point = table["next_point"][np.arange(len(rows)), view.last.numpy()]
        next_point = np.where(next_point < 0, first["point"], next_point)
        histories = self._histories(np.stack([first["point"], next_point]))
        contexts = self._features.gather(histories)
        seen = self._decoded(histories) if images else (None, None)
        context, next_context = torch.from_numpy(contexts.reshape(2, len(rows), -1))
        steps = np.arange(self.layout.horizon)
        return Batch(
            context=context,
            action=torch.from_numpy(self._actions.gather(rows)),
            mask=torch.from_numpy(steps < first["executed"][:, None]),
            valid=torch.from_numpy(steps < first["planned"][:, None]),
            reward=view.reward,
            discount=view.discount,
            next_context=next_context,
            online=torch.from_numpy(online.copy()),
            author=torch.from_numpy(first["author"].astype(np.int64)),
            outcome=torch.from_numpy(first["outcome"].astype(np.int64)),
            policy_version=torch.from_numpy(first["policy_version"].astype(np.int64)),
            task=torch.from_numpy(task),
            row=torch.from_numpy(rows.copy()),
            images=seen[0],
            next_images=seen[1],
        )

    def _decoded(self, points: NDArray[np.int64]) -> Tensor:
        """[...] points -> uint8 [..., cameras, 3, height, width]; an image that several of them saw is decoded once."""
        if not self.layout.cameras:
            raise ValueError("this replay was made without cameras; it has no images to give")
        height, width = self.layout.cameras[0].height, self.layout.cameras[0].width
        distinct, which = np.unique(points, return_inverse=True)
        decoded = np.empty((len(distinct), len(self.layout.cameras), 3, height, width), np.uint8)
        places = self._image_places.gather(distinct)
        for number, camera in enumerate(self.layout.cameras):
            stream = Stream(camera.name, "replay", "image", (height, width, 3), max_age_s=0.0)
            by_begin: dict[int, int] = {}
            for k, (begin, size) in enumerate(places[:, number].tolist()):
                known = by_begin.setdefault(begin, k)
                if known == k:
                    image = decode_image(stream, self._images.read(begin, size).tobytes())
                    decoded[k, number] = image.transpose(2, 0, 1)
                else:
                    decoded[k, number] = decoded[known, number]
        return torch.from_numpy(decoded)[torch.from_numpy(which.reshape(points.shape))]

    def episode(self, number: int) -> ReplayEpisode:
        """What the append with this number was given, superseded or not; its digest is the same. Raises ReplayMissing."""
        episode_id, task, source = self._ledger.described(number)
        before, after = self._ledger.extent(number), self._ledger.extent(number + 1)
        points, rows = after.points - before.points, after.rows - before.rows
        table = self._transitions.read(before.rows, rows).copy()
        outcome = int(table["outcome"][0]) if rows else 0
        for name in ("next_row", "episode", "task", "online", "outcome"):
            table[name] = 0
        table["point"] -= before.points
        table["next_point"] = np.where(table["next_point"] < 0, -1, table["next_point"] - before.points)
        return ReplayEpisode(
            episode_id,
            task,
            "online" if source == "online" else "offline",
            outcome,
            self._features.read(before.points, points).copy(),
            self._previous.read(before.points, points) - before.points,
            self._actions.read(before.rows, rows).copy(),
            table,
            *pack_images(self._encoded(before.points, points)),
        )

    def _encoded(self, first: int, count: int) -> list[list[bytes]]:
        """[count][cameras] the images of points that follow each other."""
        if not self.layout.cameras:
            return []
        places = self._image_places.read(first, count).tolist()
        return [[self._images.read(*place).tobytes() for place in point] for point in places]

    def _chain(
        self, rows: NDArray[np.int64], first: NDArray[Any], length: int
    ) -> tuple[NDArray[np.int64], NDArray[Any]]:
        """[B, length] consecutive transitions; the last one repeats where the episode has no more."""
        chain, table = [rows], [first]
        for _ in range(length - 1):
            following = table[-1]["next_row"]
            chain.append(np.where(following < 0, chain[-1], following))
            table.append(self._transitions.gather(chain[-1]))
        return np.stack(chain, axis=1), np.stack(table, axis=1)

    def _histories(self, points: NDArray[np.int64]) -> NDArray[np.int64]:
        """[...] points -> [..., history] points of their contexts, oldest first."""
        history = [points]
        for _ in range(self.layout.history - 1):
            history.append(self._previous.gather(history[-1]))
        return np.stack(history[::-1], axis=-1)

    # The index ---------------------------------------------------------------------------------------

    def _indexed(self) -> ReplayIndex:
        if self._index is None:
            self._index = ReplayIndex()
            gone = self._ledger.superseded(self._seen)
            self._index.extend(self._counting(0, self._extent.spans, gone))
        return self._index

    def _counting(self, first: int, end: int, gone: NDArray[np.int64]) -> NDArray[Any]:
        """The spans `first` .. `end - 1` without those of superseded episodes."""
        spans = self._spans.read(first, end - first)
        return spans[~np.isin(spans["episode"], gone)] if len(gone) else spans


@dataclass(frozen=True)
class _Appended:
    """An episode whose rows are in the columns, but do not count yet."""

    place: Place
    episode: ReplayEpisode
    digest: str
    end: Extent


class Replay(ReplayReader):
    """A reader that may append. One process at a time."""

    def __init__(self, directory: Path, layout: ReplayLayout) -> None:
        """Open or create. Raises ReplayLocked, ReplayMismatch, ColumnTooShort."""
        make_directory(directory)
        with ExitStack() as opening:  # whatever fails, nothing stays open or locked
            lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            opening.callback(os.close, lock)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ReplayLocked(f"{directory} is in use by another process") from None
            ledger = opening.enter_context(closing(Ledger.create(directory, layout)))
            self._begin(directory, ledger)
            self._fixed = False
            super().see()
            self._resources = opening.pop_all()

    def see(self, stored: int | None = None) -> None:
        """As of a reader; None: all, also those that will be appended."""
        self._fixed = stored is not None
        super().see(stored)

    def append(self, episode: ReplayEpisode) -> bool:
        """Append one episode durably; False if exactly this one is there already.

        The same id with other content (a later label changes rewards and ends) takes the place of the old rows.
        Raises ValueError if the arrays do not fit together.
        """
        return self.extend([episode]) == 1

    def extend(self, episodes: Iterable[ReplayEpisode]) -> int:
        """Append several, synced once: all of them or, if anything fails, none. Returns how many were new."""
        appended = 0
        end = self._ledger.extent(self._ledger.stored)
        self._ledger.begin()
        try:
            for episode in episodes:
                episode.check(self.layout)
                digest = episode.digest()
                if self._ledger.holds(episode.episode_id, digest):
                    continue
                place = self._ledger.place(episode)
                end = self._write(episode, place, end)
                self._ledger.add(place, episode, digest, end)
                appended += 1
            for column in self._columns:
                column.sync()
            self._ledger.commit()
        except BaseException:
            self._ledger.undo()
            for column in self._columns:
                column.close()
            raise
        if not self._fixed:
            super().see()
        return appended

    @property
    def _columns(self) -> tuple[Column, ...]:
        return (
            self._features,
            self._previous,
            self._actions,
            self._transitions,
            self._spans,
            self._images,
            self._image_places,
        )

    def _write(self, episode: ReplayEpisode, place: Place, end: Extent) -> Extent:
        """Put an episode behind what was written so far. Returns where it ends."""
        table = episode.transitions.copy()
        starts = np.full(len(episode.features) + 1, -1, np.int64)  # one more, so that next_point -1 finds -1
        starts[table["point"]] = end.rows + np.arange(len(table))
        table["next_row"] = starts[table["next_point"]]
        table["point"] += end.points
        table["next_point"] = np.where(table["next_point"] < 0, -1, table["next_point"] + end.points)
        table["episode"], table["task"] = place.number, place.task
        table["outcome"], table["online"] = episode.outcome, episode.source == "online"
        spans = _spans(table, place, end.rows)
        self._features.write(end.points, episode.features)
        self._previous.write(end.points, episode.previous + end.points)
        self._actions.write(end.rows, episode.actions)
        self._transitions.write(end.rows, table)
        self._spans.write(end.spans, spans)
        image_bytes = self._write_images(episode, end) if self.layout.cameras else 0
        return Extent(
            end.points + len(episode.features), end.rows + len(table), end.spans + len(spans), image_bytes
        )

    def _write_images(self, episode: ReplayEpisode, end: Extent) -> int:
        """Put the images behind those that are there, none of them in two segments. Returns where they end."""
        distinct, which = np.unique(episode.image_places.reshape(-1, 2), axis=0, return_inverse=True)
        at = end.image_bytes
        begins = np.empty(len(distinct), np.int64)
        for k, (begin, size) in enumerate(distinct.tolist()):
            left = self._images.segment_rows - at % self._images.segment_rows
            at += left if left < size else 0
            self._images.write(at, episode.images[begin : begin + size])
            begins[k], at = at, at + size
        places = np.stack([begins[which.reshape(-1)], distinct[which.reshape(-1), 1]], axis=-1)
        self._image_places.write(end.points, places.reshape(episode.image_places.shape))
        return at


def _spans(table: NDArray[Any], place: Place, first_row: int) -> NDArray[Any]:
    """[S] SPAN: where the author changes, a new one begins."""
    author = table["author"]
    begins = np.flatnonzero(np.concatenate([[True], author[1:] != author[:-1]])[: len(table)])
    spans = np.zeros(len(begins), SPAN)
    spans["first_row"] = first_row + begins
    spans["rows"] = np.diff(np.append(begins, len(table)))
    spans["author"] = author[begins]
    for name in ("episode", "task", "outcome", "online"):
        spans[name] = table[name][begins]
    spans["ordinal"] = place.ordinal
    return spans
