# SPDX-License-Identifier: Apache-2.0
"""Recordings of other robots and other formats as lwd episodes. See docs/import.md."""
