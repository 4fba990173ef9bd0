# SPDX-License-Identifier: Apache-2.0
"""The simulated robot as a process: it senses, obeys, refuses, holds by itself, resets and judges."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseArray
from lwd_msgs.srv import CheckSuccess, ResetScene
from sensor_msgs.msg import CameraInfo, CompressedImage, JointState
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from lwd_fleet.deployment import NodeSpec, lifecycle_manager
from lwd_fleet.sim.tasks import TASKS
from lwd_fleet.sim.world import World
from lwd_policy.embodiment import Embodiment
from lwd_policy.qos import COMMAND, EVENTS, IMAGE_LATEST

ROBOT_FILE = Path(__file__).parents[2] / "config" / "robots" / "sim_dual_arm.yaml"
BODY = Embodiment.load(ROBOT_FILE)
NAMESPACE = "/sim_r1"


class Robot:
    """The process, and what it says."""

    def __init__(self, stage, **parameters) -> None:
        self.stage = stage
        self.spec = NodeSpec(
            "lwd_fleet",
            "sim_robot_node",
            "sim_robot",
            NAMESPACE,
            {"robot_file": str(ROBOT_FILE), **parameters},
        )
        self.joints = stage.collect(JointState, f"{NAMESPACE}/joint_states", COMMAND)
        self.keypoints = stage.collect(PoseArray, f"{NAMESPACE}/keypoints", EVENTS)
        self.diagnostics = stage.collect(DiagnosticArray, "/diagnostics", EVENTS)
        self.images = {
            name: stage.collect(
                CompressedImage, f"{NAMESPACE}/camera_{name}/image_raw/compressed", IMAGE_LATEST
            )
            for name in ("top", "wrist_left", "wrist_right")
        }
        self.info = stage.collect(CameraInfo, f"{NAMESPACE}/camera_top/camera_info", EVENTS)
        self._command = stage.node.create_publisher(JointTrajectory, f"{NAMESPACE}/joint_command", COMMAND)
        stage.bring_up([self.spec])

    def command(self, **positions: float) -> None:
        message = JointTrajectory(joint_names=list(positions))
        message.points = [JointTrajectoryPoint(positions=list(positions.values()))]
        self._command.publish(message)

    def joint(self, name: str) -> float:
        return (
            dict(zip(self.joints[-1].name, self.joints[-1].position, strict=True))[name]
            if self.joints
            else np.nan
        )

    def check(self, name: str) -> tuple[str, dict[str, str]]:
        """Newest diagnostics of that name."""
        for array in reversed(self.diagnostics):
            for status in array.status:
                if status.name.endswith(f": {name}"):
                    return status.message, {value.key: value.value for value in status.values}
        return "", {}

    def reset(self, task: str = "place", seed: int = 5) -> ResetScene.Response:
        return self.stage.call(
            ResetScene, f"{NAMESPACE}/reset_scene", ResetScene.Request(task=task, seed=seed)
        )


def _poses(message: PoseArray) -> np.ndarray:
    return np.array([[pose.position.x, pose.position.y, pose.position.z] for pose in message.poses])


def _ramp(start: float, goal: float) -> Iterator[float]:
    value = start
    while True:
        value += float(np.clip(goal - value, -0.02, 0.02))
        yield value


def test_it_senses_what_the_world_of_its_seed_holds(stage):
    robot = Robot(stage, seed=3)
    stage.until(
        lambda: robot.joints and robot.keypoints and robot.info and all(robot.images.values()), "all topics"
    )
    assert list(robot.joints[-1].name) == list(BODY.joint_names)
    np.testing.assert_allclose(robot.joints[-1].position, BODY.home, atol=1e-4)
    world = World("place")
    world.reset(3)
    np.testing.assert_allclose(_poses(robot.keypoints[-1]), world.keypoints(noise=False), atol=0.04)
    assert robot.keypoints[-1].header.frame_id == "base_link"
    message = robot.images["top"][-1]
    assert message.format == "rgb8; jpeg compressed bgr8"
    picture = cv2.cvtColor(
        cv2.imdecode(np.frombuffer(message.data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB
    )
    assert np.abs(picture.astype(int) - world.render("top")).mean() < 4
    assert message.header.frame_id == "camera_top_optical_frame"
    assert robot.info[-1].width == 96
    assert robot.info[-1].k[0] > 96


def test_it_follows_commands_and_refuses_bad_ones(stage):
    robot = Robot(stage, camera_hz=0.0)
    stage.until(lambda: robot.joints, "joint states")
    ramp = _ramp(0.0, 0.3)
    stage.until(
        lambda: abs(robot.joint("left_joint_1") - 0.3) < 0.01,
        "the joint to arrive",
        lambda: robot.command(left_joint_1=next(ramp)),
    )
    stage.until(
        lambda: robot.check("command")[0] == "following",
        "diagnostics",
        lambda: robot.command(left_joint_1=0.3),
    )

    def bad() -> None:
        robot.command(left_joint_1=float("nan"))
        robot.command(left_elbow=0.0)

    stage.until(lambda: int(robot.check("command")[1].get("refused", 0)) > 2, "refusals", bad)
    assert abs(robot.joint("left_joint_1") - 0.3) < 0.01
    stage.until(
        lambda: "holding: no command for" in robot.check("command")[0], "the robot to say that it holds"
    )
    assert abs(robot.joint("left_joint_1") - 0.3) < 0.01


def test_it_resets_to_the_scene_of_a_seed_and_judges_it(stage):
    robot = Robot(stage, camera_hz=0.0, shift=json.dumps({"placement_range_scale": 1.2}))
    response = robot.reset("stow", 11)
    assert response.success
    assert response.seed == 11
    assert response.instruction in TASKS["stow"].instructions()
    verdict = stage.call(CheckSuccess, f"{NAMESPACE}/check_success", CheckSuccess.Request())
    assert verdict.success
    assert not verdict.done
    assert list(verdict.sub_step_scores) == [0.0, 0.0, 0.0]
    drawn = [robot.reset("place", -1) for _ in range(2)]
    assert all(answer.success and answer.seed >= 0 for answer in drawn)
    assert drawn[0].seed != drawn[1].seed
    unknown = robot.reset("juggle", 1)
    assert not unknown.success
    assert "juggle" in unknown.message


def test_a_wrong_configuration_says_what_is_wrong(stage):
    spec = NodeSpec("lwd_fleet", "sim_robot_node", "sim_robot", NAMESPACE, {"shift": "gale"})
    stage.start([spec, lifecycle_manager([spec], "/fleet", "lifecycle_manager")])
    message = "cannot configure: no shift 'gale'; there are none, placement"
    stage.until(lambda: message in stage._logs(), "the reason in the log")
