# SPDX-License-Identifier: Apache-2.0
"""Whether the critic knows anything yet: a policy must not be tilted towards noise (algorithm.md 4.4b)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

AUC_MIN = 0.6  # below it the policy is left alone


def outcome_auc(q: ArrayLike, success: ArrayLike, stratum: ArrayLike) -> float:
    """Chance that Q ranks a row of a success above a row of a failure of the same stratum; ties count half.

    q: [N] held-out values; success: [N] bool; stratum: [N] integers, task and time bin in one number, so that
    knowing how far an episode has come counts for nothing. nan if no stratum has both outcomes.
    """
    values, won, strata = np.asarray(q), np.asarray(success, bool), np.asarray(stratum)
    better = pairs = 0.0
    for each in np.unique(strata):
        high, low = values[(strata == each) & won], values[(strata == each) & ~won]
        ordered = np.sort(low)
        below, up_to = np.searchsorted(ordered, high, "left"), np.searchsorted(ordered, high, "right")
        better += float((below + up_to).sum()) / 2
        pairs += len(high) * len(low)
    return better / pairs if pairs else float("nan")
