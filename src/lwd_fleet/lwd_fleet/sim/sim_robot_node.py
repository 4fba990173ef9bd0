# SPDX-License-Identifier: Apache-2.0
"""The simulated robot as a driver: runs `SimulatedDriver` in real time and speaks ROS for it."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from geometry_msgs.msg import Point, Pose, PoseArray, Quaternion
from lwd_msgs.srv import CheckSuccess, ResetScene
from rclpy.clock import Clock, ClockType
from sensor_msgs.msg import CameraInfo, CompressedImage, JointState
from trajectory_msgs.msg import JointTrajectory

from lwd_fleet.sim.driver import SimulatedDriver, camera_matrix
from lwd_fleet.sim.rendering import RenderingUnavailable
from lwd_fleet.sim.robot import BASE_LINK
from lwd_fleet.sim.scene import CAMERAS, TICK_S
from lwd_fleet.sim.shift import Shift
from lwd_fleet.sim.tasks import TASKS
from lwd_fleet.sim.world import World
from lwd_policy.embodiment import Embodiment, EmbodimentError
from lwd_policy.managed_node import OK, WARN, Check, ConfigurationError, ManagedNode, parameter, run_node
from lwd_policy.qos import COMMAND, EVENTS, IMAGE_PUBLISH

_JPEG_QUALITY = 90
_JPEG_FORMAT = "rgb8; jpeg compressed bgr8"
_SEEDS = 2**31


@dataclass(frozen=True)
class SimRobotParameters:
    """Parameters of the simulated robot."""

    robot_file: str = parameter(
        "", "YAML file of the robot, checked against the simulated one; empty: no check"
    )
    task: str = parameter("place", "task of the scene before the first reset")
    seed: int = parameter(0, "of the first scene, and of the scenes drawn when a reset names no seed", low=0)
    image_size: int = parameter(96, "width and height of camera pictures", unit="px", low=16, high=640)
    camera_hz: float = parameter(10.0, "rate of each camera; 0: no cameras", unit="Hz", low=0.0, high=50.0)
    keypoint_hz: float = parameter(10.0, "rate of `keypoints`; 0: none", unit="Hz", low=0.0, high=50.0)
    command_timeout_s: float = parameter(
        0.25, "hold when no command came for so long", unit="s", low=0.02, high=10.0
    )
    shift: str = parameter("", "deployment shift: a name of shift.SHIFTS or a JSON object")


class SimRobotNode(ManagedNode):
    """Driver, cameras, scene reset and success detector of one simulated robot."""

    parameters_type = SimRobotParameters

    def __init__(self) -> None:
        super().__init__("sim_robot")
        self._driver: SimulatedDriver | None = None
        self._timer: Any = None
        self._steady = Clock(clock_type=ClockType.STEADY_TIME)

    # Lifecycle ---------------------------------------------------------------------------------------

    def configure(self) -> None:
        options: SimRobotParameters = self.parameters
        self._worlds: dict[str, World] = {}
        self._seeds = np.random.default_rng(options.seed)
        try:
            self._shift = Shift.parse(options.shift)
            world = self._world(options.task)
            world.reset(options.seed)
            self._check_robot(world.embodiment)
            if options.camera_hz > 0:
                world.render(
                    "top"
                )  # now, and not in the first episode, is the time to learn that OpenGL is missing
        except (ValueError, TypeError, EmbodimentError, RenderingUnavailable) as error:
            raise ConfigurationError(str(error)) from error
        self._driver = SimulatedDriver(world, options.command_timeout_s)
        self._ticks = 0
        self._reported_lost_s = 0.0
        self._joint_names = list(world.embodiment.joint_names)
        self._camera_ticks = _ticks(options.camera_hz)
        self._keypoint_ticks = _ticks(options.keypoint_hz)

        self._joints = self.create_publisher(JointState, "joint_states", COMMAND)
        self._keypoints = self.create_publisher(PoseArray, "keypoints", EVENTS)
        cameras = CAMERAS if self._camera_ticks else ()
        self._images = {
            name: self.create_publisher(CompressedImage, f"camera_{name}/image_raw/compressed", IMAGE_PUBLISH)
            for name in cameras
        }
        self._infos = {
            name: self.create_publisher(CameraInfo, f"camera_{name}/camera_info", EVENTS) for name in cameras
        }
        self._commands = self.create_subscription(JointTrajectory, "joint_command", self._on_command, COMMAND)
        self._served = [
            self.create_service(ResetScene, "reset_scene", self._on_reset),
            self.create_service(CheckSuccess, "check_success", self._on_check),
        ]

    def activate(self) -> None:
        self._timer = self.create_timer(TICK_S, self._on_tick, clock=self._steady)

    def deactivate(self) -> None:
        if self._timer is not None:
            self.destroy_timer(self._timer)
            self._timer = None

    def cleanup(self) -> None:
        if self._driver is None:
            return
        self._driver = None
        self.destroy_subscription(self._commands)
        for service in self._served:
            self.destroy_service(service)
        for publisher in (self._joints, self._keypoints, *self._images.values(), *self._infos.values()):
            self.destroy_publisher(publisher)

    def diagnose(self) -> list[Check]:
        driver = self._driver
        if driver is None:
            return []
        now_s = time.monotonic()
        age, holding = driver.command_age_s(now_s), driver.holding(now_s)
        if age is None:
            command = Check("command", OK, "holding: no command since the last reset")
        elif holding:
            command = Check("command", WARN, f"holding: no command for {age:.2f} s")
        else:
            command = Check("command", OK, "following")
        command.values["refused"] = driver.refused
        lost_s = driver.lost_s - self._reported_lost_s
        self._reported_lost_s = driver.lost_s
        late = lost_s > 0
        time_check = Check(
            "real_time",
            WARN if late else OK,
            f"late: {lost_s:.2f} s were not simulated" if late else "in time",
            {"lost_s": f"{driver.lost_s:.3f}"},
        )
        return [command, time_check]

    # Inputs ------------------------------------------------------------------------------------------

    def _on_command(self, message: JointTrajectory) -> None:
        if self._driver is None or not self.active:
            return
        positions = message.points[0].positions if message.points else []
        refusal = self._driver.accept(list(message.joint_names), list(positions), time.monotonic())
        if refusal is not None:
            self.get_logger().error(refusal, throttle_duration_sec=1.0)

    def _on_reset(self, request: ResetScene.Request, response: ResetScene.Response) -> ResetScene.Response:
        assert self._driver is not None
        seed = int(self._seeds.integers(_SEEDS)) if request.seed < 0 else int(request.seed)
        try:
            world = self._world(request.task or self._driver.world.task.name)
        except ValueError as error:
            response.success, response.message = False, str(error)
            return response
        world.reset(seed)
        self._driver.reset(world)
        response.success, response.message = True, "reset"
        response.instruction, response.seed = world.instruction, seed
        response.time_limit_s = world.time_limit_s
        return response

    def _on_check(
        self, request: CheckSuccess.Request, response: CheckSuccess.Response
    ) -> CheckSuccess.Response:
        assert self._driver is not None
        response.success = True
        response.done = self._driver.world.done()
        response.sub_step_scores = list(self._driver.world.sub_step_scores())
        return response

    # Outputs -----------------------------------------------------------------------------------------

    def _on_tick(self) -> None:
        assert self._driver is not None
        before = self._ticks
        self._ticks += self._driver.advance(time.monotonic())
        if self._ticks == before:
            return
        self._publish_joints()
        if _due(before, self._ticks, self._keypoint_ticks):
            self._publish_keypoints()
        if _due(before, self._ticks, self._camera_ticks):
            self._publish_cameras()

    def _publish_joints(self) -> None:
        assert self._driver is not None
        world = self._driver.world
        message = JointState(name=self._joint_names)
        message.header.stamp = self.get_clock().now().to_msg()
        message.position = world.joint_positions.tolist()
        message.velocity = world.joint_velocities.tolist()
        self._joints.publish(message)

    def _publish_keypoints(self) -> None:
        assert self._driver is not None
        message = PoseArray()
        message.header.stamp = self.get_clock().now().to_msg()
        message.header.frame_id = BASE_LINK
        message.poses = [
            Pose(position=Point(x=x, y=y, z=z), orientation=Quaternion(w=1.0))
            for x, y, z in self._driver.world.keypoints().tolist()
        ]
        self._keypoints.publish(message)

    def _publish_cameras(self) -> None:
        assert self._driver is not None
        world = self._driver.world
        stamp = self.get_clock().now().to_msg()  # one for all: the world stands still while it is drawn
        for name, publisher in self._images.items():
            frame = f"camera_{name}_optical_frame"
            picture = cv2.cvtColor(world.render(name), cv2.COLOR_RGB2BGR)
            encoded, jpeg = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
            if not encoded:
                raise RuntimeError(f"camera {name}: JPEG encoding failed")
            message = CompressedImage(format=_JPEG_FORMAT, data=jpeg.tobytes())
            message.header.stamp, message.header.frame_id = stamp, frame
            publisher.publish(message)
            self._infos[name].publish(self._info(world, name, message.header))

    def _info(self, world: World, camera: str, header: Any) -> CameraInfo:
        matrix = camera_matrix(world.field_of_view(camera), world.image_size)
        info = CameraInfo(header=header, height=world.image_size, width=world.image_size)
        info.distortion_model, info.d = "plumb_bob", [0.0] * 5
        info.k, info.r = matrix.ravel(), np.eye(3).ravel()
        info.p = np.hstack([matrix, np.zeros((3, 1))]).ravel()
        return info

    # Helpers -----------------------------------------------------------------------------------------

    def _world(self, task: str) -> World:
        """The world of a task; each is made once."""
        if task not in TASKS:
            raise ValueError(f"no task {task!r}; there are {', '.join(TASKS)}")
        if task not in self._worlds:
            self._worlds[task] = World(task, self._shift, self.parameters.image_size)
        return self._worlds[task]

    def _check_robot(self, simulated: Embodiment) -> None:
        if not self.parameters.robot_file:
            return
        robot = Embodiment.load(self.parameters.robot_file)
        if robot.joint_names != simulated.joint_names:
            raise ConfigurationError(
                f"robot_file {self.parameters.robot_file} describes {robot.name!r}, and the simulator is "
                f"{simulated.name!r}: their joints differ"
            )


def _ticks(rate_hz: float) -> int:
    """Output ticks between two messages of a rate; 0: never."""
    return max(1, round(1.0 / (rate_hz * TICK_S))) if rate_hz > 0 else 0


def _due(before: int, after: int, every: int) -> bool:
    """Whether a multiple of `every` was passed."""
    return every > 0 and before // every != after // every


def main() -> None:
    """Entry point of the executable."""
    sys.exit(run_node(SimRobotNode))


if __name__ == "__main__":
    main()
