# SPDX-License-Identifier: Apache-2.0
"""The robot side (simulator, arbiter, episodes, recorder, uploader) and the fleet side (catalog, coordinator)."""
