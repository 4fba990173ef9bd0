# SPDX-License-Identifier: Apache-2.0
"""The base of every node: lifecycle, declared parameters, diagnostics and a clean end.

A node's parameters are the fields of one frozen dataclass, its work is in four hooks. Everything else a
managed node has to get right (what a failed transition says, what happens on SIGINT) is written once, here.
"""

from __future__ import annotations

import dataclasses
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, ClassVar, get_type_hints

import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.signals import SignalHandlerOptions

OK, WARN, ERROR = DiagnosticStatus.OK, DiagnosticStatus.WARN, DiagnosticStatus.ERROR

_TYPES = {
    bool: Parameter.Type.BOOL,
    int: Parameter.Type.INTEGER,
    float: Parameter.Type.DOUBLE,
    str: Parameter.Type.STRING,
    tuple[str, ...]: Parameter.Type.STRING_ARRAY,
    tuple[float, ...]: Parameter.Type.DOUBLE_ARRAY,
    tuple[int, ...]: Parameter.Type.INTEGER_ARRAY,
}
_SPIN_TIMEOUT_S = 0.1  # how late a signal can be noticed while nothing happens
_FINISH_S = 5.0  # the longest that a process which was told to end goes on for what is `unfinished`


class ConfigurationError(Exception):
    """A node cannot be configured or activated as it was told; the text says what to change."""


@dataclass(frozen=True)
class Check:
    """One line of a node's diagnostics."""

    name: str
    level: bytes
    message: str
    values: dict[str, Any] = dataclasses.field(default_factory=dict)


def parameter(
    default: Any,
    description: str,
    *,
    name: str | None = None,
    unit: str = "",
    low: float | None = None,
    high: float | None = None,
    read_only: bool = True,
) -> Any:
    """Field of a parameter dataclass. `name` overrides the ROS name (dots are not legal in a field name);
    `low` and `high` are inclusive; read-only parameters can be set at start only."""
    metadata = {
        "name": name,
        "description": f"{description} [{unit}]" if unit else description,
        "low": low,
        "high": high,
        "read_only": read_only,
    }
    return dataclasses.field(default=default, metadata=metadata)


class ManagedNode(LifecycleNode):
    """A lifecycle node whose subclass says what it needs (`parameters_type`) and does (the hooks).

    `parameters` always holds the current values. Hooks raise `ConfigurationError` to refuse a transition.
    """

    parameters_type: ClassVar[type]

    def __init__(self, name: str) -> None:
        super().__init__(name)
        types = get_type_hints(self.parameters_type)
        for field in dataclasses.fields(self.parameters_type):
            self._declare(field, _TYPES[types[field.name]])
        self.parameters: Any = self._read_parameters()
        self.add_post_set_parameters_callback(self._parameters_changed)
        self._diagnostics = self.create_publisher(DiagnosticArray, "diagnostics", 10)
        self._diagnostics_timer = self.create_timer(1.0, self._publish_diagnostics)
        self._configured = False
        self._active = False

    # Hooks -------------------------------------------------------------------------------------------

    def configure(self) -> None:
        """Open resources, create publishers, subscriptions and services."""

    def activate(self) -> None:
        """Start timers and outputs."""

    def deactivate(self) -> None:
        """Stop outputs first, then timers. Must be safe to call at any time after `configure`."""

    def unfinished(self) -> bool:
        """Whether something that `deactivate` has brought to its end still waits for others to answer. A process that
        is told to end goes on serving it for a while: what a node sent just before it died may never arrive."""
        return False

    def cleanup(self) -> None:
        """Free what `configure` opened. Must be safe to call at any time."""

    def diagnose(self) -> list[Check]:
        """Current health, asked once per second in every state."""
        return []

    # Lifecycle ---------------------------------------------------------------------------------------

    @property
    def active(self) -> bool:
        """Whether the node is in the lifecycle state `active`."""
        return self._active

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        result = self._attempt("configure", self.configure)
        self._configured = result == TransitionCallbackReturn.SUCCESS
        return result

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        super().on_activate(state)
        result = self._attempt("activate", self.activate)
        self._active = result == TransitionCallbackReturn.SUCCESS
        return result

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        result = self._attempt("deactivate", self.deactivate)
        self._active = False
        super().on_deactivate(state)
        return result

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        result = self._attempt("clean up", self.cleanup)
        self._configured = False
        return result

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        self.stop()
        return TransitionCallbackReturn.SUCCESS

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        self.stop()
        return TransitionCallbackReturn.SUCCESS

    def stop(self, finish: Callable[[], None] = lambda: None) -> None:
        """Leave whatever state the node is in, outputs first. Called once before the process ends. finish: serves what
        is `unfinished`."""
        if self._active:
            self._active = False
            self.deactivate()
            finish()
        if self._configured:
            self._configured = False
            self.cleanup()

    def _attempt(self, what: str, hook: Callable[[], None]) -> TransitionCallbackReturn:
        try:
            hook()
        except ConfigurationError as error:
            self.get_logger().error(f"cannot {what}: {error}")
            return TransitionCallbackReturn.FAILURE
        except Exception:
            # rclpy turns any exception into the transition ERROR without a word; the reason must not be lost.
            self.get_logger().error(f"failed to {what}:\n{traceback.format_exc()}")
            raise
        return TransitionCallbackReturn.SUCCESS

    # Parameters --------------------------------------------------------------------------------------

    def _declare(self, field: dataclasses.Field[Any], kind: Parameter.Type) -> None:
        meta = field.metadata
        descriptor = ParameterDescriptor(description=meta["description"], read_only=meta["read_only"])
        low, high = meta["low"], meta["high"]
        if low is not None or high is not None:
            if kind == Parameter.Type.INTEGER:
                bounds = (-(2**63) if low is None else int(low), 2**63 - 1 if high is None else int(high))
                descriptor.integer_range = [IntegerRange(from_value=bounds[0], to_value=bounds[1], step=1)]
            else:
                bounds_f = (-1e308 if low is None else float(low), 1e308 if high is None else float(high))
                descriptor.floating_point_range = [
                    FloatingPointRange(from_value=bounds_f[0], to_value=bounds_f[1], step=0.0)
                ]
        # An empty list has no type of its own for rclpy (it becomes a byte array): declare it by type, unset.
        value = list(field.default) or kind if isinstance(field.default, tuple) else field.default
        self.declare_parameter(meta["name"] or field.name, value, descriptor)

    def _read_parameters(self) -> Any:
        values: dict[str, Any] = {}
        for field in dataclasses.fields(self.parameters_type):
            name = field.metadata["name"] or field.name
            value = self.get_parameter_or(name, Parameter(name, value=field.default)).value
            values[field.name] = tuple(value) if isinstance(field.default, tuple) else value
        return self.parameters_type(**values)

    def _parameters_changed(self, changed: list[Parameter]) -> None:
        self.parameters = self._read_parameters()

    # Diagnostics -------------------------------------------------------------------------------------

    def _publish_diagnostics(self) -> None:
        message = DiagnosticArray()
        message.header.stamp = self.get_clock().now().to_msg()
        name = self.get_fully_qualified_name()
        state = "active" if self._active else "inactive" if self._configured else "unconfigured"
        for check in [Check("lifecycle", OK, state), *self.diagnose()]:
            status = DiagnosticStatus(level=check.level, name=f"{name}: {check.name}", message=check.message)
            status.hardware_id = self.get_namespace().strip("/")
            status.values = [KeyValue(key=key, value=str(value)) for key, value in check.values.items()]
            message.status.append(status)
        self._diagnostics.publish(message)


def run_node(node_type: Callable[[], ManagedNode], args: Sequence[str] | None = None) -> int:
    """Run one node until SIGINT or SIGTERM; the process's `main`. Returns the exit status.

    The signals are handled here and not by rclpy, whose handler invalidates the context first: a node
    could then no longer publish that it stops, nor a recorder seal its bag while its services answer.
    """
    rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
    stop_requested = False

    def request_stop(number: int, frame: FrameType | None) -> None:
        nonlocal stop_requested
        stop_requested = True

    # They stay so until the process ends: a second Ctrl-C while it does would otherwise turn a clean end into -2.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, request_stop)
    executor = SingleThreadedExecutor()
    node: ManagedNode | None = None

    def finish() -> None:
        end_s = time.monotonic() + _FINISH_S
        while stop_requested and node is not None and node.unfinished() and time.monotonic() < end_s:
            executor.spin_once(timeout_sec=_SPIN_TIMEOUT_S)

    try:
        node = node_type()
        executor.add_node(node)
        while not stop_requested:
            executor.spin_once(timeout_sec=_SPIN_TIMEOUT_S)
    finally:
        if node is not None:
            node.stop(finish)
            executor.remove_node(node)
            node.destroy_node()
        executor.shutdown()
        rclpy.try_shutdown()
    return 0
