# SPDX-License-Identifier: Apache-2.0
"""The supervisor with real processes: parameters arrive, deaths are noticed, nothing outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import yaml

from lwd_fleet.deployment import NodeSpec
from lwd_fleet.domain import PrivateDomain
from lwd_fleet.supervisor import Supervisor, SupervisorError, executable, parameter_file

WAIT_S = 20.0

PROGRAMS = {
    "polite": "import signal, sys, time\nsignal.signal(signal.SIGINT, lambda *_: sys.exit(0))\n",
    "deaf": "import signal, time\nfor number in (2, 15): signal.signal(number, signal.SIG_IGN)\n",
    "brief": "import sys\nsys.exit(3)\n",
}
ENDLESS = "import os, sys\nprint('up', sys.argv, 'domain', os.environ.get('ROS_DOMAIN_ID'), flush=True)\nwhile True: time.sleep(0.05)\n"


@pytest.fixture
def prefix(tmp_path, monkeypatch):
    """An installed package `toys` with programs that end politely, never, or at once."""
    root = tmp_path / "prefix"
    index = root / "share/ament_index/resource_index/packages"
    index.mkdir(parents=True)
    (index / "toys").touch()
    library = root / "lib/toys"
    library.mkdir(parents=True)
    for name, text in PROGRAMS.items():
        program = library / name
        program.write_text(f"#!{sys.executable} -S\n{text}" + ("" if name == "brief" else ENDLESS))
        program.chmod(0o755)
    monkeypatch.setenv("AMENT_PREFIX_PATH", str(root))
    return root


def spec(program: str, **changes) -> NodeSpec:
    return NodeSpec(
        **{"package": "toys", "executable": program, "name": program, "namespace": "/sim_r1", **changes}
    )


def wait_for(condition, what: str) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def gone(pid: int) -> bool:
    """Whether the process has ended; a zombie has, though nobody asked it yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_node_gets_its_name_namespace_parameters_remappings_and_environment(prefix, tmp_path):
    one = spec("polite", parameters={"rate": 5.0, "tasks.sim_r1": ["place"], "empty": []})
    with Supervisor([one], tmp_path / "run", environment={"ROS_DOMAIN_ID": "7"}) as supervisor:
        (status,) = supervisor.status()
        wait_for(lambda: "up" in status.log_file.read_text(), "the node never came up")
        text = status.log_file.read_text()
    assert "domain 7" in text
    for word in ("__node:=polite", "__ns:=/sim_r1", "diagnostics:=/diagnostics", "--params-file"):
        assert word in text
    content = yaml.safe_load((tmp_path / "run/parameters/sim_r1.polite.yaml").read_text())
    assert content == {"/sim_r1/polite": {"ros__parameters": {"rate": 5.0, "tasks.sim_r1": ["place"]}}}
    assert supervisor.status()[0].exit_status == 0
    assert yaml.safe_load(parameter_file(one)) == content


def test_a_killed_node_comes_back_and_one_without_respawn_stays_down(prefix, tmp_path):
    reports: list[str] = []
    specs = [spec("polite"), spec("polite", name="once", respawn=False)]
    with Supervisor(specs, tmp_path, report=reports.append, back_off_s=(0.05,)) as supervisor:
        before = supervisor.status()
        for status in before:
            os.kill(status.pid, signal.SIGKILL)
        wait_for(lambda: supervisor.poll() or supervisor.status()[0].starts == 2, "not started again")
        wait_for(lambda: supervisor.poll() or supervisor.status()[1].pid is None, "death not noticed")
        again, once = supervisor.status()
        assert again.pid not in (None, before[0].pid) and again.exit_status == -signal.SIGKILL
        assert once.starts == 1
    assert any("/sim_r1/polite was ended by SIGKILL; starting it again" in line for line in reports)
    assert any("/sim_r1/once was ended by SIGKILL; it stays down" in line for line in reports)


def test_a_node_that_keeps_dying_is_started_ever_more_rarely(prefix, tmp_path):
    now = 0.0
    supervisor = Supervisor(
        [spec("brief")], tmp_path, report=lambda line: None, back_off_s=(1.0, 2.0, 4.0), clock=lambda: now
    )
    supervisor.start()
    starts = []
    for _ in range(4):
        wait_for(lambda: supervisor.poll() or supervisor.status()[0].pid is None, "still alive")
        assert supervisor.status()[0].exit_status == 3
        waited = 0.0
        count = supervisor.status()[0].starts
        while supervisor.status()[0].starts == count:
            now += 0.5
            waited += 0.5
            supervisor.poll()
        starts.append(waited)
    supervisor.stop()
    assert starts == [1.0, 2.0, 4.0, 4.0]


def test_a_deaf_node_is_killed_in_the_end_and_a_polite_one_is_not(prefix, tmp_path, monkeypatch):
    monkeypatch.setattr("lwd_fleet.supervisor._TERM_TIMEOUT_S", 0.2)
    reports: list[str] = []
    specs = [spec("polite"), spec("deaf", stop_timeout_s=0.2)]
    supervisor = Supervisor(specs, tmp_path, report=reports.append)
    supervisor.start()
    for status in supervisor.status():
        wait_for(lambda status=status: "up" in status.log_file.read_text(), "never came up")
    supervisor.stop()
    polite, deaf = supervisor.status()
    assert (polite.exit_status, deaf.exit_status) == (0, -signal.SIGKILL)
    assert reports == [
        "/sim_r1/deaf did not end; sending SIGTERM",
        "/sim_r1/deaf did not end; sending SIGKILL",
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG")
def test_no_node_outlives_a_supervisor_killed_with_sigkill(prefix, tmp_path):
    script = textwrap.dedent(
        f"""
        import time
        from lwd_fleet.deployment import NodeSpec
        from lwd_fleet.supervisor import Supervisor
        specs = [NodeSpec("toys", "deaf", f"deaf{{n}}", "/sim_r1") for n in range(2)]
        with Supervisor(specs, {str(tmp_path)!r}) as supervisor:
            print(*(status.pid for status in supervisor.status()), flush=True)
            time.sleep(600)
        """
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert len(pids) == 2 and not any(gone(pid) for pid in pids)
    for log in (tmp_path / "log").glob("*.log"):
        wait_for(lambda log=log: "up" in log.read_text(), "never came up")
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_for(lambda: all(gone(pid) for pid in pids), f"orphans: {pids}")


def test_a_program_that_was_not_built_is_named(prefix, tmp_path):
    with pytest.raises(SupervisorError, match="/sim_r1/new: package toys in .* has no executable new"):
        Supervisor([spec("new")], tmp_path)


def test_without_an_installed_package_the_module_is_run(monkeypatch):
    monkeypatch.setenv("AMENT_PREFIX_PATH", "")
    node = NodeSpec("lwd_fleet", "arbiter_node", "arbiter", "/sim_r1")
    assert executable(node) == [sys.executable, "-m", "lwd_fleet.robot.arbiter_node"]


def test_two_runs_never_share_a_domain():
    with PrivateDomain() as one, PrivateDomain() as other:
        assert one.number != other.number
        assert {one.number, other.number} <= set(range(1, 102))
        assert one.environment["ROS_AUTOMATIC_DISCOVERY_RANGE"] == "LOCALHOST"
        assert one.environment["FASTDDS_BUILTIN_TRANSPORTS"], (
            "not shared memory: a kill would stop its neighbours"
        )
