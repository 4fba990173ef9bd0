# SPDX-License-Identifier: Apache-2.0
"""The fleet side: task assignment and policy roll-out."""
