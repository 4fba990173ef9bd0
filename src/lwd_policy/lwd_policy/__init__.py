# SPDX-License-Identifier: Apache-2.0
"""What an observation and an action are, the flow policy, its checkpoints and the node that runs it."""
