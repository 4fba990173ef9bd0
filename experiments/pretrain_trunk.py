# SPDX-License-Identifier: Apache-2.0
"""Pretrain the image trunk of the simulated robot on randomised scenes of every task, once; it is shipped and frozen.

    scripts/run python experiments/pretrain_trunk.py generate --frames 40000 --out runs/trunk
    scripts/run python experiments/pretrain_trunk.py train --data runs/trunk --minutes 60

Labels come from the simulator (positions of all things, what the instruction refers to), as auxiliary targets of
pretraining only: nothing of them enters an observation. The randomisation is generic and knows no deployment.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import cv2
import mujoco
import numpy as np
import torch
import typer
from torch import Tensor
from torch.nn import functional as F

from lwd_fleet.sim.experts import Expert
from lwd_fleet.sim.language import instructions
from lwd_fleet.sim.presets import trunk_config
from lwd_fleet.sim.scene import ITEMS, KEYPOINT_NAMES, build_model
from lwd_fleet.sim.shift import Randomisation
from lwd_fleet.sim.tasks import TASKS
from lwd_fleet.sim.world import ABSENT, World
from lwd_policy.observation import COMMAND, JOINT_POSITIONS, Observation
from lwd_policy.text import encode_bytes
from lwd_policy.trunk import ImageTrunk, Perception, body_state, build_trunk
from lwd_policy.trunk_file import load_trunk, save_trunk

IMAGE_SIZE = 96
TICKS_PER_STEP = 5
NEAR_M = 0.20  # a tool camera is asked for the nearest item only if it is about in view
POSITION_UNIT_M = 0.01  # the loss turns from square to linear here
BLOB_SIGMA = 0.05  # in image coordinates, about two pixels: the camera is not quite where it should be
RANDOMISATION = Randomisation(camera_position_m=0.012, camera_angle_rad=0.012, camera_fov_deg=1.0)

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.command()
def generate(
    out: Annotated[Path, typer.Option(help="Directory of the data set")],
    frames: Annotated[int, typer.Option(help="Frames to render")] = 40_000,
    seed: Annotated[int, typer.Option(help="First scene; give each of several processes its own range")] = 0,
) -> None:
    """Render frames of expert episodes in randomised scenes."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    shard = out / f"{seed:09d}"
    cameras = trunk_config("images").cameras
    images = np.lib.format.open_memmap(
        shard.with_suffix(".images.npy"), "w+", np.uint8, (frames, len(cameras), IMAGE_SIZE, IMAGE_SIZE, 3)
    )
    rows: dict[str, list[Any]] = {
        "body": [],
        "keypoints": [],
        "offsets": [],
        "task": [],
        "item": [],
        "place": [],
    }
    started = time.monotonic()
    for index, (world, command) in zip(range(frames), _scenes(seed), strict=False):
        for camera, name in enumerate(cameras):
            images[index, camera] = _through_jpeg(world.render(name.removeprefix("camera_")))
        for key, value in _labels(world, command).items():
            rows[key].append(value)
        if index % 1000 == 0:
            print(f"{index} frames, {time.monotonic() - started:.0f} s", flush=True)
    images.flush()
    np.savez(shard.with_suffix(".npz"), **{key: np.array(values) for key, values in rows.items()})


@app.command()
def train(
    data: Annotated[Path, typer.Option(help="Directory of the data set")],
    out: Annotated[Path, typer.Option(help="Where the trunk is written")] = Path(
        "config/trunks/sim_dual_arm"
    ),
    minutes: Annotated[float, typer.Option(help="Training time")] = 60.0,
    batch: Annotated[int, typer.Option(help="Samples per update")] = 64,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    start: Annotated[Path | None, typer.Option(help="Trunk to go on from")] = None,
) -> None:
    """Train the trunk; the last 5 % of the frames are held out."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shards = [
        (np.load(p.with_suffix(".images.npy"), mmap_mode="r"), np.load(p)) for p in sorted(data.glob("*.npz"))
    ]
    rows = {key: np.concatenate([shard[1][key] for shard in shards]) for key in shards[0][1].files}
    images = np.concatenate([shard[0][: len(shard[1]["item"])] for shard in shards])
    held_out = len(images) // 20
    rng = np.random.default_rng(0)
    trunk = build_trunk(trunk_config("images"), World("place").embodiment)
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
        index = rng.integers(len(images) - held_out, size=batch)
        inputs = _inputs(images, rows, index, rng, "train", device)
        seen = trunk.perceive(inputs)
        guidance = max(0.0, 1.0 - 1.5 * elapsed)  # of the heat maps; at last only positions count
        loss = _loss(seen, rows, index, device) + guidance * _heat_loss(seen.heat, rows, index, projection)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trunk.parameters(), 1.0)
        optimiser.step()
        step += 1
        if step % 500 == 0:
            validation = _validate(trunk, images, rows, held_out, device)
            print(
                json.dumps(
                    {"step": step, "minutes": round(elapsed * minutes, 1), "loss": loss.item(), **validation}
                ),
                flush=True,
            )
            save_trunk(out, trunk, {"steps": step, "frames": len(images), **validation})
    validation = _validate(trunk, images, rows, held_out, device)
    save_trunk(out, trunk, {"steps": step, "frames": len(images), **validation})
    print(json.dumps({"step": step, **validation}))


def _scenes(seed: int) -> Iterator[tuple[World, np.ndarray]]:
    """Moments of expert episodes in ever new scenes, with the command in force."""
    worlds = {name: World(name, randomisation=RANDOMISATION) for name in TASKS}
    names = list(worlds)
    for number in range(seed, seed + 10_000_000):
        rng = np.random.default_rng([number, 7])
        world = worlds[names[number % len(names)]]
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


def _labels(world: World, command: np.ndarray) -> dict[str, Any]:
    observation = Observation(0, {JOINT_POSITIONS: world.joint_positions, COMMAND: command}, {})
    body = body_state(world.embodiment, [observation])[0]
    keypoints = world.keypoints(noise=False)
    tools = body.reshape(2, -1)[:, :3]
    offsets = keypoints[None, : len(ITEMS)] - tools[:, None]
    nearest = np.linalg.norm(offsets, axis=-1).argmin(axis=1)
    place = f"{world.goal.side}_tray" if world.goal.side else "box"
    return {
        "body": body,
        "keypoints": keypoints,
        "offsets": offsets[[0, 1], nearest],
        "task": list(TASKS).index(world.task.name),
        "item": KEYPOINT_NAMES.index(world.goal.item),
        "place": KEYPOINT_NAMES.index(place),
    }


def _through_jpeg(image: np.ndarray) -> np.ndarray:
    """The policy never sees an image that was not compressed."""
    _, encoded = cv2.imencode(".jpg", image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])
    return cv2.imdecode(encoded, cv2.IMREAD_COLOR)[:, :, ::-1]


def _inputs(
    images: np.ndarray,
    rows: dict[str, np.ndarray],
    index: np.ndarray,
    rng: np.random.Generator,
    split: str,
    device: str,
) -> dict[str, Tensor]:
    """Instructions are drawn anew each time: any of its wordings belongs to a goal."""
    texts = []
    for i in index:
        task, item = list(TASKS)[rows["task"][i]], KEYPOINT_NAMES[rows["item"][i]]
        side = KEYPOINT_NAMES[rows["place"][i]].removesuffix("_tray") if task == "place" else ""
        texts.append(str(rng.choice(instructions(task, item, side, split))))
    return {
        "images": torch.from_numpy(images[index]).to(device),
        "body": torch.from_numpy(rows["body"][index]).to(device),
        "tokens": encode_bytes(texts).to(device),
    }


def _loss(seen: Perception, rows: dict[str, np.ndarray], index: np.ndarray, device: str) -> Tensor:
    target, present, offsets, near, item, place = _targets(rows, index, device)
    error = F.smooth_l1_loss(seen.keypoints, target, beta=POSITION_UNIT_M, reduction="none").mean(-1)
    near_error = F.smooth_l1_loss(seen.tool_offsets, offsets, beta=POSITION_UNIT_M, reduction="none").mean(-1)
    loss: Tensor = (
        30 * (error * present).sum() / present.sum()
        + 10 * (near_error * near).sum() / near.sum().clamp(min=1)
        + 0.2 * F.binary_cross_entropy_with_logits(seen.presence_logits, present)
        + 0.2 * F.cross_entropy(seen.item_logits, item)
        + 0.2 * F.cross_entropy(seen.place_logits, place)
    )
    return loss


def _heat_loss(
    heat: Tensor, rows: dict[str, np.ndarray], index: np.ndarray, projection: np.ndarray
) -> Tensor:
    """Cross-entropy to a blob where the unmoved overview camera would see each thing.

    Without it the maps start uniform and positions hardly pull on them: a first minute became twenty.
    """
    target, present = _targets(rows, index, str(heat.device))[:2]
    points = torch.cat([target, torch.ones_like(target[..., :1])], dim=-1) @ torch.tensor(
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
    model = build_model("place")
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    camera = model.camera("top").id
    rotation, position = data.cam_xmat[camera].reshape(3, 3).T, data.cam_xpos[camera]
    zoom = 1.0 / np.tan(np.deg2rad(model.cam_fovy[camera]) / 2)
    intrinsic = np.array([[zoom, 0, 0], [0, -zoom, 0], [0, 0, -1.0]])  # looks along -z, rows count downwards
    return (intrinsic @ np.hstack([rotation, (-rotation @ position)[:, None]])).astype(np.float32)


def _targets(rows: dict[str, np.ndarray], index: np.ndarray, device: str) -> tuple[Tensor, ...]:
    config = trunk_config("images")
    target = torch.from_numpy(rows["keypoints"][index]).to(device)
    present = (target - torch.tensor(ABSENT, device=device)).abs().amax(-1) > 1e-6
    offsets = torch.from_numpy(rows["offsets"][index]).to(device)
    near = offsets.norm(dim=-1) < NEAR_M
    item = torch.tensor([config.items.index(int(i)) for i in rows["item"][index]], device=device)
    place = torch.tensor([config.places.index(int(i)) for i in rows["place"][index]], device=device)
    return target, present.float(), offsets.float(), near.float(), item, place


@torch.no_grad()
def _validate(
    trunk: ImageTrunk, images: np.ndarray, rows: dict[str, np.ndarray], held_out: int, device: str
) -> dict[str, float]:
    """Errors on held-out frames, with held-out wordings."""
    rng = np.random.default_rng(1)
    errors, near_errors, hits = [], [], []
    trunk.eval()
    for index in np.array_split(np.arange(len(images) - min(held_out, 1000), len(images)), 8):
        seen = trunk.perceive(_inputs(images, rows, index, rng, "heldout", device))
        target, present, offsets, near, item, place = _targets(rows, index, device)
        errors.append((seen.keypoints - target).norm(dim=-1)[:, :3][present[:, :3] > 0].cpu())
        near_errors.append((seen.tool_offsets - offsets).norm(dim=-1)[near > 0].cpu())
        hits.append(
            ((seen.item_logits.argmax(-1) == item) & (seen.place_logits.argmax(-1) == place)).float().cpu()
        )
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
