# SPDX-License-Identifier: Apache-2.0
"""Parts of the OGBench experiment; `experiments/ogbench.py` is its command line."""
