# SPDX-License-Identifier: Apache-2.0
"""What happens to an episode after it was lived: format, store, catalog, upload.

Nothing here but the node needs ROS.
"""
