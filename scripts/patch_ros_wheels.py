# SPDX-License-Identifier: Apache-2.0
"""Correct the include paths in the CMake files of the ROS 2 wheels of this Python environment.

The wheels were built elsewhere, and their exported CMake targets name the Python and NumPy headers of that machine.
Without this, no interface package can be built against them. Running it again changes nothing.
"""

import re
import sys
import sysconfig
from pathlib import Path

import numpy

_HEADERS = {
    r"/opt/python/[^/;\"]+/include/python3\.\d+": sysconfig.get_path("include"),
    r"/opt/python/[^/;\"]+/lib/python3\.\d+/site-packages/numpy/(?:_core|core)/include": numpy.get_include(),
}


def main() -> int:
    """Patch every exported CMake file below this environment; an error if a foreign path remains."""
    remaining = []
    for file in sorted(Path(sys.prefix, "share").glob("*/cmake/*.cmake")):
        text = patched = file.read_text(encoding="utf-8")
        for pattern, path in _HEADERS.items():
            patched = re.sub(pattern, lambda _, path=path: path, patched)
        if patched != text:
            file.write_text(patched, encoding="utf-8")
        if "/opt/python/" in patched:
            remaining.append(file)
    if remaining:
        print(f"paths of another machine remain in: {', '.join(map(str, remaining))}", file=sys.stderr)
    return 1 if remaining else 0


if __name__ == "__main__":
    sys.exit(main())
