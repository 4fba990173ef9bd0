# SPDX-License-Identifier: Apache-2.0
"""The example that draws adjoint matching on two modes runs from end to end and knows its exact answer."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).parents[3] / "examples" / "qam_on_a_mixture.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("qam_on_a_mixture", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_it_draws_its_figure_after_a_few_updates(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "figure.png"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--out", str(out), "--updates", "3"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert out.read_bytes().startswith(b"\x89PNG") and done.stdout.count("distance") == 5


def test_its_exact_tilt_is_the_base_times_the_exponential_of_the_value(example: ModuleType) -> None:
    at = torch.linspace(-2.5, 2.5, 5001)
    unnormalised = example.BASE.density(at) * torch.exp(example.action_value(at[:, None]))
    numeric = unnormalised / torch.trapezoid(unnormalised, at)
    assert torch.allclose(example.BASE.tilt().density(at), numeric, atol=2e-4)


def test_the_closed_form_flow_ends_in_its_mixture_when_the_steps_are_many(example: ModuleType) -> None:
    noise = torch.special.ndtri((torch.arange(2001) + 0.5) / 2001).unsqueeze(-1)
    tilt = example.BASE.tilt()
    end = example.qam.integrate(tilt.velocity, noise, 400)[:, 0]
    assert example.Outcome(end).distance(tilt) < 0.005
