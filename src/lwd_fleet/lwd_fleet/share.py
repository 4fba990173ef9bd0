# SPDX-License-Identifier: Apache-2.0
"""What packages have installed beside their code, without ROS: the ament index is a list of prefixes."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def share_directory(package: str) -> Path | None:
    """`share/<package>` of the first prefix that has it, of AMENT_PREFIX_PATH and then of this Python; else None."""
    for prefix in (*os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep), sys.prefix):
        folder = Path(prefix) / "share" / package
        if prefix and folder.is_dir():
            return folder
    return None
