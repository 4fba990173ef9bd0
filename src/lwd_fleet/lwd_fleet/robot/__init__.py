# SPDX-License-Identifier: Apache-2.0
"""The robot side: what runs between the policy and the motors."""
