# SPDX-License-Identifier: Apache-2.0
"""What one episode is to the replay: its observation points, its chunk transitions, and what they must satisfy."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from lwd_learner.transitions import EpisodeRows

Source = Literal["offline", "online"]

TRANSITION = np.dtype(
    [
        ("point", "i8"),  # row of `features` decided on
        ("next_point", "i8"),  # row of `features` after it, -1 where the episode ended
        ("next_row", "i8"),  # transition that starts at next_point, -1: none
        ("episode", "i8"),  # number in the ledger
        ("task", "i4"),  # number in the ledger
        ("executed", "i4"),  # steps until the next decision
        ("planned", "i4"),  # steps of the same author, up to the horizon
        ("policy_version", "i4"),
        ("reward", "f4"),  # of the last executed step, not discounted
        ("done", "?"),
        ("cut", "?"),
        ("online", "?"),  # of the episode, as its outcome
        ("outcome", "u1"),
        ("author", "u1"),
    ],
    align=True,
)


@dataclass(frozen=True)
class Camera:
    """A camera whose images are kept, as recorded, and the size at which they are looked at."""

    name: str  # of the observation's stream
    height: int
    width: int


@dataclass(frozen=True)
class ReplayLayout:
    """What a row is made of, and how files are cut; fixed for the life of a directory."""

    feature_dim: int  # F
    horizon: int  # H
    action_dim: int  # A
    history: int = 2  # observation points in a context
    feature_key: str = ""  # digest of trunk, preprocessing and normaliser that made features and actions
    segment_bytes: int = 64 << 20  # of one file; a map of it takes no memory, so small ones only cost time
    cameras: tuple[
        Camera, ...
    ] = ()  # of one size; none: cached features are all that is kept of an observation

    def __post_init__(self) -> None:
        if len({(camera.height, camera.width) for camera in self.cameras}) > 1:
            raise ValueError(
                f"images of one size make a batch; {', '.join(map(str, self.cameras))} have several"
            )

    @staticmethod
    def from_values(values: Mapping[str, Any]) -> ReplayLayout:
        """From what `dataclasses.asdict` made of one, by way of JSON."""
        cameras = tuple(Camera(**camera) for camera in values["cameras"])
        return ReplayLayout(**{**values, "cameras": cameras})


@dataclass(frozen=True)
class ReplayEpisode:
    """One episode to append. K observations, R transitions; indices count from the episode's start."""

    episode_id: str
    task: str
    source: Source
    outcome: int
    features: NDArray[np.float32]  # [K, F]
    previous: NDArray[np.int64]  # [K] the observation before in a context, itself at the start of one
    actions: NDArray[np.float32]  # [R, H, A]
    # [R] TRANSITION; `next_row`, `episode`, `task`, `online` and `outcome` are filled in on append
    transitions: NDArray[Any]
    # Encoded images, one after the other, and where those of each observation begin and how long they are [K, cameras, 2].
    images: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))
    image_places: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 0, 2), np.int64))

    @staticmethod
    def from_rows(rows: EpisodeRows, source: Source) -> ReplayEpisode:
        """From what `transitions.episode_rows` returns."""
        table = np.zeros(len(rows.transitions), TRANSITION)
        for i, transition in enumerate(rows.transitions):
            for name in ("point", "next_point", "executed", "planned", "policy_version", "reward"):
                table[name][i] = getattr(transition, name)
            table["done"][i], table["cut"][i] = transition.done, transition.cut
            table["author"][i] = transition.author
        trace = rows.trace
        return ReplayEpisode(
            trace.episode_id,
            trace.task,
            source,
            trace.outcome,
            rows.features,
            rows.previous,
            rows.actions,
            table,
            *pack_images(rows.images),
        )

    def digest(self) -> str:
        """sha256 of everything that training would see."""
        hasher = hashlib.sha256(repr((self.task, self.source, self.outcome)).encode())
        columns = [self.transitions[name] for name in TRANSITION.names or ()]  # not the padding between them
        for array in (self.features, self.previous, self.actions, *columns, self.images, self.image_places):
            hasher.update(np.ascontiguousarray(array).tobytes())
        return hasher.hexdigest()

    def check(self, layout: ReplayLayout) -> None:
        """Raise ValueError naming what does not fit together."""
        table, points = self.transitions, len(self.features)
        problems = {
            "features": self.features.shape != (points, layout.feature_dim),
            "previous": self.previous.shape != (points,)
            or bool(((self.previous < 0) | (self.previous > np.arange(points))).any()),
            "actions": self.actions.shape != (len(table), layout.horizon, layout.action_dim),
            "finiteness": not (np.isfinite(self.features).all() and np.isfinite(self.actions).all()),
            "executed": bool(((table["executed"] < 1) | (table["executed"] > layout.horizon)).any()),
            "point": bool(((table["point"] < 0) | (table["point"] >= points)).any()),
            "next_point": bool((table["next_point"] >= points).any())
            or bool((table["next_point"] < -1).any()),
            "done": bool(((table["next_point"] < 0) & ~table["done"]).any()),  # nothing to bootstrap from
            "images": not self._images_fit(layout),
            "source": self.source not in ("offline", "online"),
        }
        wrong = [name for name, problem in problems.items() if problem]
        if wrong:
            raise ValueError(f"{self.episode_id}: not a replayable episode, wrong {', '.join(wrong)}")

    def _images_fit(self, layout: ReplayLayout) -> bool:
        if not layout.cameras:
            return len(self.images) == self.image_places.size == 0
        begin, size = self.image_places[..., 0], self.image_places[..., 1]
        return self.image_places.shape == (len(self.features), len(layout.cameras), 2) and bool(
            (
                (begin >= 0)
                & (size > 0)
                & (size <= layout.segment_bytes)
                & (begin + size <= len(self.images))
            ).all()
        )


def pack_images(images: Sequence[Sequence[bytes]]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """[K][cameras] encoded images -> `ReplayEpisode.images`, `image_places`. What several observations saw is kept once."""
    begins: dict[bytes, int] = {}
    end = 0
    for image in (image for observation in images for image in observation):
        if image not in begins:
            begins[image] = end
            end += len(image)
    places = [[(begins[image], len(image)) for image in observation] for observation in images]
    shape = (len(images), len(images[0]), 2) if images else (0, 0, 2)
    return np.frombuffer(b"".join(begins), np.uint8), np.array(places, np.int64).reshape(shape)
