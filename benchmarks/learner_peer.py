# SPDX-License-Identifier: Apache-2.0
"""Times the update of the published QAM code (JAX) for learner.py; runs in that code's Python, with its packages.

    PYTHON benchmarks/learner_peer.py CHECKOUT

For each line `SIZE UPDATES` on its input it writes a line with the mean wall and processor seconds of one update.
"""

from __future__ import annotations

import sys
import time

import jax
import numpy as np

STATE, HORIZON, ACTION, ROWS = 28, 5, 5, 256


def make(size: str) -> tuple[object, dict[str, jax.Array]]:
    """The agent of a size like 512x4_q10, and a random batch."""
    from agents.qam import QAMAgent, get_config  # of the checkout

    layers, critics = size.split("_q")
    width, depth = map(int, layers.split("x"))
    config = get_config()
    config.actor_hidden_dims = config.value_hidden_dims = (width,) * depth
    config.num_qs, config.horizon_length, config.action_chunking = int(critics), HORIZON, True
    config.inv_temp = 1.0
    agent = QAMAgent.create(0, np.zeros(STATE, np.float32), np.zeros(ACTION, np.float32), config)
    random = np.random.default_rng(0)
    batch = {
        "observations": random.normal(size=(ROWS, STATE)),
        "next_observations": random.normal(size=(ROWS, HORIZON, STATE)),
        "actions": random.uniform(-1, 1, (ROWS, HORIZON, ACTION)),
        "rewards": -np.ones((ROWS, HORIZON)),
        "masks": np.ones((ROWS, HORIZON)),
        "valid": np.ones((ROWS, HORIZON)),
    }
    return agent, {key: jax.numpy.asarray(value, np.float32) for key, value in batch.items()}


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    made: dict[str, tuple[object, dict[str, jax.Array]]] = {}
    for line in sys.stdin:
        size, updates = line.split()
        agent, batch = made.get(size) or make(size)
        wall, processor = time.perf_counter(), time.process_time()
        for _ in range(int(updates)):
            agent, _ = agent.update(batch)
        jax.block_until_ready(agent.network.params)
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        made[size] = agent, batch
        print(wall / int(updates), processor / int(updates), flush=True)


if __name__ == "__main__":
    main()
