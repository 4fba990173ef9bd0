# SPDX-License-Identifier: Apache-2.0
"""One rank of the training that test_distributed.py compares with training on a single process; run by torchrun."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lwd_learner.batch import Batch
from lwd_learner.critic import CriticConfig
from lwd_learner.descent import NonFiniteLoss
from lwd_learner.distributed import joined
from lwd_learner.extraction.awr import AwrConfig
from lwd_learner.extraction.edit import EditConfig
from lwd_learner.extraction.one_step import OneStepConfig
from lwd_learner.extraction.recap import RecapConfig
from lwd_learner.image_encoder import ImageEncoderConfig, Sight
from lwd_learner.qam import QamConfig
from lwd_learner.ranks import ALONE, Ranks, RanksDiverged
from lwd_learner.replay_episode import TRANSITION, Camera, ReplayEpisode, ReplayLayout, pack_images
from lwd_learner.shared_replay import SharedReplay
from lwd_learner.trainer import Trainer, TrainerConfig
from lwd_learner.training_state import saved_states

C, H, A, ROWS = 6, 4, 2, 16
CLONE_STEPS, LEARN_STEPS = 5, 15  # twenty in all
CROWDED = 0.6  # share outside the box; about what it is, so that ranks left alone would decide differently
LWD = TrainerConfig(
    extraction=QamConfig(steps=5), critic=CriticConfig(width=32, embedding=8), batch=ROWS, policy_rate=3e-3
)
EYES = ImageEncoderConfig(channels=(4, 4), grid=2, view=8, width=16)
SIGHT = Sight(2, (Camera("top", 8, 8),))
CASES = {
    "lwd": LWD,
    "lwd_paper": LWD.paper(),
    "gaussian": replace(LWD, extraction=QamConfig(steps=5, adjoint="gaussian", spread_rows=4)),
    "some_rows": replace(LWD, policy_rows=8),
    "crowded": replace(LWD, extraction=QamConfig(steps=5, clip=0.5, saturated_share_max=CROWDED)),
    "edit": replace(LWD, head=EditConfig()),
    "one_step": replace(LWD, head=OneStepConfig(acts_after=5)),
    "awr": replace(LWD, extraction=AwrConfig(temperature=0.3)),
    "own": replace(LWD, critic=replace(LWD.critic, features="own", encoder=EYES)),
}
NEED_WHOLE_NETWORKS = (CASES["edit"], CASES["one_step"], replace(LWD, extraction=RecapConfig()))


class BlockExpert(nn.Module):
    """The interface of a flow expert; a list of blocks, and a buffer that no state dictionary holds."""

    scale: Tensor
    context_entry = "enter"

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor([1.0, 2.0]), persistent=False)
        self.enter = nn.Linear(C + H * A + 2, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.leave = nn.Linear(width, H * A)

    def forward(self, context: Tensor, noisy: Tensor, flow_time: Tensor) -> Tensor:
        hidden = self.enter(torch.cat([context, noisy.flatten(1), flow_time[:, None] * self.scale], dim=-1))
        for block in self.blocks:
            hidden = hidden + block(nn.functional.silu(hidden))
        velocity: Tensor = self.leave(hidden)
        return velocity.view_as(noisy)


def union(step: int) -> Batch:
    """The whole global batch of a step. Rows differ in what counts; only odd ones, from step 10 on, are online."""
    g = torch.Generator().manual_seed(step)
    executed = torch.randint(1, H + 1, (ROWS, 1), generator=g)
    planned = torch.randint(0, H + 1, (ROWS, 1), generator=g)
    done = torch.rand(ROWS, generator=g) < 0.3
    steps = torch.arange(H)
    return Batch(
        context=torch.randn(ROWS, C, generator=g),
        action=torch.randn(ROWS, H, A, generator=g).clamp(-1, 1),
        mask=steps < executed,
        valid=steps < planned,
        reward=done.to(torch.get_default_dtype()),
        discount=torch.where(done, 0.0, 0.97).to(torch.get_default_dtype()),
        next_context=torch.randn(ROWS, C, generator=g),
        online=(torch.arange(ROWS) % 2 == 1) & (step >= 10),
        author=torch.ones(ROWS, dtype=torch.int64),
        outcome=torch.ones(ROWS, dtype=torch.int64),
        policy_version=torch.zeros(ROWS, dtype=torch.int64),
        task=torch.zeros(ROWS, dtype=torch.int64),
        row=torch.arange(ROWS),
        images=torch.randint(256, (ROWS, 2, 1, 3, 8, 8), dtype=torch.uint8, generator=g),
        next_images=torch.randint(256, (ROWS, 2, 1, 3, 8, 8), dtype=torch.uint8, generator=g),
    )


def part(batch: Batch, ranks: Ranks) -> Batch:
    return batch.each(ranks.mine)


def trainer(case: str, ranks: Ranks = ALONE, seed: int = 0) -> Trainer:
    torch.manual_seed(seed)
    return Trainer(BlockExpert(), C, H, A, CASES[case], seed=seed, ranks=ranks, sight=SIGHT)


def updates(made: Trainer, ranks: Ranks, until: int = CLONE_STEPS + LEARN_STEPS) -> list[dict[str, float]]:
    """The trainer's next steps; returns their metrics."""
    curve = []
    while made.steps < until:
        batch = part(union(made.steps), ranks)
        if made.steps < CLONE_STEPS:
            curve.append(made.clone(batch))
            continue
        if made.actor.reference is None:
            made.freeze_reference()
        curve.append(made.learn(batch))
    return curve


def tensors(made: Trainer) -> dict[str, Tensor]:
    """All that was trained, whole."""
    whole = made.ranks.whole
    return {
        f"{name}/{key}": whole(t).clone()
        for name, module in made._modules()
        for key, t in module.state_dict().items()
    }


def compare(out: Path, ranks: Ranks, cases: list[str]) -> None:
    """Train the cases; write tensors and metrics."""
    for case in cases:
        made = trainer(case, ranks, seed=ranks.index if ranks.size > 1 and case == "lwd" else 0)
        if case == "lwd":  # networks were made from other seeds, and are the first rank's; so are the streams
            made.actor.noise.manual_seed(0)
        curve = updates(made, ranks)
        result = tensors(made)
        if ranks.first:
            save_file(result, out / f"{case}.safetensors")
            (out / f"{case}.json").write_text(json.dumps(curve))


def agree(out: Path, ranks: Ranks) -> None:
    """What one rank alone knows, all must act on: write what each of them saw."""
    seen: dict[str, object] = {}
    made = trainer("lwd", ranks)
    updates(made, ranks, until=CLONE_STEPS + 2)
    before = tensors(made)
    broken = part(union(0), ranks)
    if ranks.index == 1:
        broken = replace(broken, reward=broken.reward * torch.nan)
    try:
        made.values._update_critic(broken, 0.6)
    except NonFiniteLoss as error:
        seen["non_finite"] = str(error)
    after = tensors(made)
    seen["unchanged"] = all(torch.equal(before[name], after[name]) for name in before)
    generator = torch.Generator().manual_seed(0)
    seen["draws"] = torch.rand(3, generator=ranks.sampling(generator)).tolist()
    seen["next"] = torch.rand(1, generator=generator).tolist()
    made.save(out / "whole")
    loaded = trainer("lwd", ranks, seed=1)
    loaded.load(out / "whole" if ranks.first else out / "elsewhere")  # another host has no copy
    curves = [updates(each, ranks, until=CLONE_STEPS + 6) for each in (made, loaded)]
    seen["goes_on"] = curves[0] == curves[1]
    with torch.no_grad():
        parameter = next(made.values.value_descent.module.parameters())
        parameter.add_(float(ranks.index))
    try:
        made.save(out / "diverged")
    except RanksDiverged as error:
        seen["diverged"] = str(error)
    seen["refused"] = [refusal(config, ranks) for config in NEED_WHOLE_NETWORKS]
    (out / f"agreed.{ranks.index}.json").write_text(json.dumps(seen))


def refusal(config: TrainerConfig, ranks: Ranks) -> str:
    """What is said where a trainer cannot be made; empty where it can."""
    try:
        Trainer(BlockExpert(), C, H, A, config, ranks=ranks)
    except ValueError as error:
        return str(error)
    return ""


def survive(out: Path, ranks: Ranks) -> None:
    """Train with a save every few steps; in the first life rank 1 is killed between two of them."""
    made = trainer("lwd", ranks)
    if saved_states(out / "states"):
        made.load(out / "states")
    while made.steps < CLONE_STEPS + LEARN_STEPS:
        if made.steps == 13 and ranks.index == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        metrics = updates(made, ranks, until=made.steps + 1)
        if ranks.first:
            with (out / "curve.jsonl").open("a") as file:
                file.write(json.dumps([made.steps, metrics[0]]) + "\n")
        if made.steps % 5 == 0:
            made.save(out / "states")
    result = tensors(made)
    if ranks.first:
        save_file(result, out / "end.safetensors")


def watch(out: Path, ranks: Ranks, hosts: int) -> None:
    """Draw from a replay that grows at the first rank while the other one is late; write what each saw at each step."""
    ranks.keeper = ranks.first or hosts == 2
    layout = ReplayLayout(2, H, A, feature_key="k", cameras=SIGHT.cameras)
    shared = SharedReplay(out / f"{hosts}.host{ranks.index if hosts == 2 else 0}", layout, ranks)
    seen = []
    for step in range(12):
        if ranks.first:
            for number in range(step % 4):
                shared.written.append(flat_episode(f"{step}.{number}"))
            if step == 8:  # a later label: the episode takes the place of the old one
                shared.written.append(flat_episode("1.0", rows=3))
        else:
            time.sleep(0.02 * (step % 3))
        count = shared.agree()
        if ranks.first and step % 2:  # what comes between the agreement and the draw is for the next step
            shared.written.append(flat_episode(f"{step}.late"))
        if count:
            batch = shared.part.sample(4, torch.Generator().manual_seed(step), 0.9)
            seen.append([count, batch.row.tolist(), batch.context[:, -1].tolist()])
    shared.agree()
    digests = [shared.whole.episode(number).digest() for number in range(shared.whole.stored)]
    (out / f"seen.{hosts}.{ranks.index}.json").write_text(json.dumps([seen, digests]))
    shared.close()


def flat_episode(name: str, rows: int = 2) -> ReplayEpisode:
    """An episode of `rows` chunks, whose features are a function of its name."""
    table = np.zeros(rows, TRANSITION)
    table["point"], table["next_point"] = np.arange(rows), [*range(1, rows), -1]
    table["executed"], table["planned"], table["author"], table["reward"] = H, H, 1, 0.25
    table["done"][-1] = True
    random = np.random.default_rng([*name.encode()])
    features = random.normal(size=(rows, 2)).astype(np.float32)
    previous = np.maximum(np.arange(rows) - 1, 0)
    actions = random.normal(size=(rows, H, A)).astype(np.float32)
    images = pack_images([[random.bytes(5 + row)] for row in range(rows)])  # nobody looks at them here
    return ReplayEpisode(name, "place", "online", 1, features, previous, actions, table, *images)


def main() -> None:
    out, strategy, task, *cases = sys.argv[1:]
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    with joined(strategy, holds=task == "survive" and os.environ["RANK"] == "1") as ranks:
        if task == "compare":
            compare(Path(out), ranks, cases)
            agree(Path(out), ranks)
            for hosts in (1, 2):
                watch(Path(out), ranks, hosts)
        else:
            survive(Path(out), ranks)


if __name__ == "__main__":
    main()
