# SPDX-License-Identifier: Apache-2.0
"""Transitions, replay, the learning algorithms, evaluation, and the `lwd` command."""
