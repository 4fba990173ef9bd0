# SPDX-License-Identifier: Apache-2.0
"""Pretrain the image trunk of the simulated robot on randomised scenes of every task, once; it is shipped and frozen.

    scripts/run python experiments/pretrain_trunk.py generate --frames 40000 --out runs/trunk
    scripts/run python experiments/pretrain_trunk.py train --data runs/trunk --minutes 60
    scripts/run python experiments/pretrain_trunk.py text --suite eight    # for keypoints: no images, a minute

Labels come from the simulator (positions of all things, what the instruction refers to), as auxiliary targets of
pretraining only: nothing of them enters an observation. The randomisation is generic and knows no deployment.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import cv2
import mujoco
import numpy as np
import torch
import typer
from torch import Tensor
from torch.nn import functional as F

from lwd_fleet.sim import robot
from lwd_fleet.sim.experts import Expert
from lwd_fleet.sim.parts import Parts
from lwd_fleet.sim.presets import trunk_config
from lwd_fleet.sim.scene import build_model
from lwd_fleet.sim.shift import Randomisation
from lwd_fleet.sim.tasks import SPLITS, SUITES, Goal, Suite, Task
from lwd_fleet.sim.world import ABSENT, World
from lwd_policy.observation import COMMAND, JOINT_POSITIONS, Observation
from lwd_policy.text import encode_bytes
from lwd_policy.trunk import ImageTrunk, Perception, Trunk, body_state, build_trunk
from lwd_policy.trunk_file import load_trunk, save_trunk

IMAGE_SIZE = 96
TICKS_PER_STEP = 5
NEAR_M = 0.20  # a tool camera is asked for the nearest item only if it is about in view
POSITION_UNIT_M = 0.01  # the loss turns from square to linear here
BLOB_SIGMA = 0.05  # in image coordinates, about two pixels: the camera is not quite where it should be
RANDOMISATION = Randomisation(camera_position_m=0.012, camera_angle_rad=0.012, camera_fov_deg=1.0)

TRUNKS = Path("config/trunks")

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.command()
def generate(
    out: Annotated[Path, typer.Option(help="Directory of the data set")],
    frames: Annotated[int, typer.Option(help="Frames to render")] = 40_000,
    seed: Annotated[int, typer.Option(help="First scene; give each of several processes its own range")] = 0,
    suite: Annotated[str, typer.Option(help=f"One of {', '.join(SUITES)}")] = "demo",
) -> None:
    """Render frames of expert episodes in randomised scenes."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    shard = out / f"{seed:09d}"
    cameras = trunk_config("images", suite).cameras
    images = np.lib.format.open_memmap(
        shard.with_suffix(".images.npy"), "w+", np.uint8, (frames, len(cameras), IMAGE_SIZE, IMAGE_SIZE, 3)
    )
    rows: dict[str, list[Any]] = {
        "body": [],
        "keypoints": [],
        "offsets": [],
        "goal": [],
    }
    started = time.monotonic()
    for index, (world, command) in zip(range(frames), _scenes(SUITES[suite], seed), strict=False):
        for camera, name in enumerate(cameras):
            images[index, camera] = _through_jpeg(world.render(name.removeprefix("camera_")))
        for key, value in _labels(SUITES[suite], world, command).items():
            rows[key].append(value)
        if index % 1000 == 0:
            print(f"{index} frames, {time.monotonic() - started:.0f} s", flush=True)
    images.flush()
    np.savez(shard.with_suffix(".npz"), **{key: np.array(values) for key, values in rows.items()})


@app.command()
def train(
    data: Annotated[Path, typer.Option(help="Directory of the data set")],
    out: Annotated[
        Path | None, typer.Option(help="Where the trunk is written; default: where the suite's is shipped")
    ] = None,
    minutes: Annotated[float, typer.Option(help="Training time")] = 60.0,
    batch: Annotated[int, typer.Option(help="Samples per update")] = 64,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    start: Annotated[Path | None, typer.Option(help="Trunk to go on from")] = None,
    suite: Annotated[str, typer.Option(help=f"One of {', '.join(SUITES)}")] = "demo",
) -> None:
    """Train the trunk; the last 5 % of the frames are held out."""
    out = out or TRUNKS / f"sim_{suite}"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    frames = Frames.load(data, SUITES[suite])
    held_out = len(frames.images) // 20
    rng = np.random.default_rng(0)
    trunk = build_trunk(trunk_config("images", suite), robot.embodiment())
    assert isinstance(trunk, ImageTrunk)
    if start is not None:
        load_trunk(start, trunk)
    trunk.to(device)
    projection = _overview_projection()
    optimiser = torch.optim.AdamW(trunk.parameters(), lr=1e-3, weight_decay=1e-4)
    began, step = time.monotonic(), 0
    while (elapsed := (time.monotonic() - began) / (60 * minutes)) < 1.0:
        for group in optimiser.param_groups:
            group["lr"] = 1e-3 * min(1.0, step / 200) * (0.5 + 0.5 * np.cos(np.pi * elapsed)) + 1e-6
        index = rng.integers(len(frames.images) - held_out, size=batch)
        inputs = frames.inputs(index, rng, "train", device)
        seen = trunk.perceive(inputs)
        guidance = max(0.0, 1.0 - 1.5 * elapsed)  # of the heat maps; at last only positions count
        targets = frames.targets(index, device)
        loss = _loss(seen, targets) + guidance * _heat_loss(seen.heat, targets, projection)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trunk.parameters(), 1.0)
        optimiser.step()
        step += 1
        if step % 500 == 0:
            validation = _validate(trunk, frames, held_out, device)
            print(
                json.dumps(
                    {"step": step, "minutes": round(elapsed * minutes, 1), "loss": loss.item(), **validation}
                ),
                flush=True,
            )
            save_trunk(out, trunk, {"steps": step, "frames": len(frames.images), **validation})
    validation = _validate(trunk, frames, held_out, device)
    save_trunk(out, trunk, {"steps": step, "frames": len(frames.images), **validation})
    print(json.dumps({"step": step, **validation}))


@app.command()
def text(
    suite: Annotated[str, typer.Option(help=f"One of {', '.join(SUITES)}")],
    out: Annotated[
        Path | None, typer.Option(help="Where the trunk is written; default: where the suite's is shipped")
    ] = None,
    steps: Annotated[int, typer.Option(help="Updates of 64 instructions")] = 3000,
) -> None:
    """Train only the understanding of instructions: all that the trunk for keypoints has to learn."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    out = out or TRUNKS / f"sim_{suite}"
    vocabulary = SUITES[suite]
    trunk = build_trunk(trunk_config("keypoints", suite), robot.embodiment())
    sentences = {
        split: [(text, goal) for task, goal in _goals(vocabulary) for text in task.instructions(split, goal)]
        for split in SPLITS
    }
    optimiser = torch.optim.AdamW(trunk.parameters(), lr=1e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    rng = np.random.default_rng(0)
    for step in range(1, steps + 1):
        chosen = [sentences["train"][i] for i in rng.integers(len(sentences["train"]), size=64)]
        chosen = [(_as_people_speak(text, goal, rng), goal) for text, goal in chosen]
        loss, _ = _read(trunk, vocabulary, chosen)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trunk.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 500 == 0:
            with torch.no_grad():
                understood = float(_read(trunk, vocabulary, sentences["heldout"])[1])
            print(json.dumps({"step": step, "loss": loss.item(), "heldout_wordings_understood": understood}))
    save_trunk(out, trunk, {"steps": steps, "heldout_wordings_understood": round(understood, 4)})


_COURTESIES = (
    "please",
    "could you",
    "can you",
    "i would like you to",
    "now",
    "next",
    "robot,",
    "would you",
    "ok,",
)
_LOST_WORDS = 0.15  # share of words that are not heard


def _as_people_speak(sentence: str, goal: Goal, rng: np.random.Generator) -> str:
    """A wording with a courtesy more and some words less: a few hundred sentences would be learned by heart otherwise. What
    the goal is about is always said."""
    said = {*goal.item.split("_"), goal.side}
    words = [word for word in sentence.split() if word.strip(",.") in said or rng.random() > _LOST_WORDS]
    if rng.random() < 0.3:
        words.insert(0, str(rng.choice(_COURTESIES)))
    return " ".join(words)


def _read(trunk: Trunk, suite: Suite, sentences: list[tuple[str, Goal]]) -> tuple[Tensor, Tensor]:
    """Loss, and share of sentences of which item and place were understood."""
    embedding = trunk.text(encode_bytes([sentence for sentence, _ in sentences]))
    item = torch.tensor([suite.items.index(goal.item) for _, goal in sentences])
    place = torch.tensor([suite.places.index(goal.place) for _, goal in sentences])
    items, places = trunk.item_query(embedding), trunk.place_query(embedding)
    right = (items.argmax(-1) == item) & (places.argmax(-1) == place)
    return F.cross_entropy(items, item) + F.cross_entropy(places, place), right.float().mean()


@dataclass(frozen=True)
class Targets:
    """What a batch should be perceived as. keypoints [B, N, 3], present [B, N], offsets [B, tools, 3] to what can be
    grasped nearest to a tool, near [B, tools]: whether that is about in view, item and place [B]: class indices."""

    keypoints: Tensor
    present: Tensor
    offsets: Tensor
    near: Tensor
    item: Tensor
    place: Tensor


@dataclass(frozen=True)
class Frames:
    """The data set: images [F, cameras, h, w, 3] and their labels."""

    suite: Suite
    images: np.ndarray
    rows: dict[str, np.ndarray]

    @classmethod
    def load(cls, directory: Path, suite: Suite) -> Frames:
        """All shards of a directory, in the order of their names."""
        files = sorted(directory.glob("*.npz"))
        shards = [(np.load(p.with_suffix(".images.npy"), mmap_mode="r"), np.load(p)) for p in files]
        rows = {key: np.concatenate([shard[1][key] for shard in shards]) for key in shards[0][1].files}
        return cls(suite, np.concatenate([shard[0][: len(shard[1]["goal"])] for shard in shards]), rows)

    def inputs(
        self, index: np.ndarray, rng: np.random.Generator, split: str, device: str
    ) -> dict[str, Tensor]:
        """What the trunk is given. Instructions are drawn anew each time: any of its wordings belongs to a goal."""
        goals = _goals(self.suite)
        texts = []
        for number in self.rows["goal"][index]:
            task, goal = goals[number]
            sentence = str(rng.choice(task.instructions(split, goal)))
            texts.append(_as_people_speak(sentence, goal, rng) if split == "train" else sentence)
        return {
            "images": torch.from_numpy(self.images[index]).to(device),
            "body": torch.from_numpy(self.rows["body"][index]).to(device),
            "tokens": encode_bytes(texts).to(device),
        }

    def targets(self, index: np.ndarray, device: str) -> Targets:
        """What they should be perceived as."""
        goals = [_goals(self.suite)[number][1] for number in self.rows["goal"][index]]
        keypoints = torch.from_numpy(self.rows["keypoints"][index]).to(device)
        offsets = torch.from_numpy(self.rows["offsets"][index]).float().to(device)
        return Targets(
            keypoints=keypoints,
            present=((keypoints - torch.tensor(ABSENT, device=device)).abs().amax(-1) > 1e-6).float(),
            offsets=offsets,
            near=(offsets.norm(dim=-1) < NEAR_M).float(),
            item=torch.tensor([self.suite.items.index(goal.item) for goal in goals], device=device),
            place=torch.tensor([self.suite.places.index(goal.place) for goal in goals], device=device),
        )


def _goals(suite: Suite) -> list[tuple[Task, Goal]]:
    return [(task, goal) for task in suite.tasks for goal in task.goals]


def _scenes(suite: Suite, seed: int) -> Iterator[tuple[World, np.ndarray]]:
    """Moments of expert episodes in ever new scenes, with the command in force."""
    worlds = [World(task.name, randomisation=RANDOMISATION) for task in suite.tasks]
    for number in range(seed, seed + 10_000_000):
        rng = np.random.default_rng([number, 7])
        world = worlds[number % len(worlds)]
        world.reset(number)
        command = world.joint_positions.copy()
        yield world, command
        expert = Expert(world, rng, 1.5)
        while not world.done() and world.time_s < world.time_limit_s:
            before, command = command, expert.command()
            for tick in range(TICKS_PER_STEP):
                world.step(before + (tick + 1) / TICKS_PER_STEP * (command - before))
            if rng.random() < 0.15:
                yield world, command


def _labels(suite: Suite, world: World, command: np.ndarray) -> dict[str, Any]:
    observation = Observation(0, {JOINT_POSITIONS: world.joint_positions, COMMAND: command}, {})
    body = body_state(world.embodiment, [observation])[0]
    parts = world.task.parts
    tools = body.reshape(2, -1)[:, :3]
    graspable = np.array([world.grasp_point(part.name) for part in (*parts.things, *parts.panels)])
    offsets = graspable[None] - tools[:, None]
    nearest = np.linalg.norm(offsets, axis=-1).argmin(axis=1)
    return {
        "body": body,
        "keypoints": world.keypoints(noise=False),
        "offsets": offsets[[0, 1], nearest],
        "goal": _goals(suite).index((world.task, world.goal)),
    }


def _through_jpeg(image: np.ndarray) -> np.ndarray:
    """The policy never sees an image that was not compressed."""
    _, encoded = cv2.imencode(".jpg", image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])
    return cv2.imdecode(encoded, cv2.IMREAD_COLOR)[:, :, ::-1]


def _loss(seen: Perception, targets: Targets) -> Tensor:
    error = F.smooth_l1_loss(seen.keypoints, targets.keypoints, beta=POSITION_UNIT_M, reduction="none").mean(
        -1
    )
    near_error = F.smooth_l1_loss(
        seen.tool_offsets, targets.offsets, beta=POSITION_UNIT_M, reduction="none"
    ).mean(-1)
    present, near = targets.present, targets.near
    loss: Tensor = (
        30 * (error * present).sum() / present.sum()
        + 10 * (near_error * near).sum() / near.sum().clamp(min=1)
        + 0.2 * F.binary_cross_entropy_with_logits(seen.presence_logits, present)
        + 0.2 * F.cross_entropy(seen.item_logits, targets.item)
        + 0.2 * F.cross_entropy(seen.place_logits, targets.place)
    )
    return loss


def _heat_loss(heat: Tensor, targets: Targets, projection: np.ndarray) -> Tensor:
    """Cross-entropy to a blob where the unmoved overview camera would see each thing.

    Without it the maps start uniform and positions hardly pull on them: a first minute became twenty.
    """
    keypoints, present = targets.keypoints, targets.present
    points = torch.cat([keypoints, torch.ones_like(keypoints[..., :1])], dim=-1) @ torch.tensor(
        projection.T, device=heat.device
    )
    centre = points[..., :2] / points[..., 2:]
    height, width = heat.shape[-2:]
    y = torch.linspace(-1, 1, height, device=heat.device)[:, None] - centre[..., 1, None, None]
    x = torch.linspace(-1, 1, width, device=heat.device) - centre[..., 0, None, None]
    blob = torch.exp(-(x**2 + y**2) / (2 * BLOB_SIGMA**2)).flatten(2)
    blob = blob / blob.sum(-1, keepdim=True).clamp(min=1e-6)
    entropy = -(blob * heat.flatten(2)).sum(-1)
    return (entropy * present).sum() / present.sum()


def _overview_projection() -> np.ndarray:
    """[3, 4] base_link -> image coordinates in [-1, 1] (times depth) of the overview camera where it should be."""
    model = build_model(Parts(()), "empty")
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    camera = model.camera("top").id
    rotation, position = data.cam_xmat[camera].reshape(3, 3).T, data.cam_xpos[camera]
    zoom = 1.0 / np.tan(np.deg2rad(model.cam_fovy[camera]) / 2)
    intrinsic = np.array([[zoom, 0, 0], [0, -zoom, 0], [0, 0, -1.0]])  # looks along -z, rows count downwards
    return (intrinsic @ np.hstack([rotation, (-rotation @ position)[:, None]])).astype(np.float32)


@torch.no_grad()
def _validate(trunk: ImageTrunk, frames: Frames, held_out: int, device: str) -> dict[str, float]:
    """Errors on held-out frames, with held-out wordings."""
    rng = np.random.default_rng(1)
    errors, near_errors, hits = [], [], []
    total, named = len(frames.images), list(trunk.config.items)
    trunk.eval()
    for index in np.array_split(np.arange(total - min(held_out, 1000), total), 8):
        seen = trunk.perceive(frames.inputs(index, rng, "heldout", device))
        targets = frames.targets(index, device)
        error = (seen.keypoints - targets.keypoints).norm(dim=-1)[:, named]
        errors.append(error[targets.present[:, named] > 0].cpu())
        near_errors.append((seen.tool_offsets - targets.offsets).norm(dim=-1)[targets.near > 0].cpu())
        item, place = seen.item_logits.argmax(-1), seen.place_logits.argmax(-1)
        hits.append(((item == targets.item) & (place == targets.place)).float().cpu())
    trunk.train()
    error, near_error = torch.cat(errors), torch.cat(near_errors)
    return {
        "item_error_median_mm": round(1e3 * error.median().item(), 2),
        "item_error_p90_mm": round(1e3 * error.quantile(0.9).item(), 2),
        "tool_offset_error_median_mm": round(1e3 * near_error.median().item(), 2),
        "heldout_wordings_understood": round(torch.cat(hits).mean().item(), 4),
    }


if __name__ == "__main__":
    app()
