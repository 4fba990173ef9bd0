# SPDX-License-Identifier: Apache-2.0
"""What of a run's transitions is worth cloning: the part in which imitating methods differ."""

from __future__ import annotations

from dataclasses import replace

from lwd_learner.replay import Selection
from lwd_learner.transitions import AUTHOR_EXPERT, AUTHOR_HUMAN, AUTHOR_POLICY, OUTCOME_SUCCESS

_SUCCEEDED = frozenset({OUTCOME_SUCCESS})

# What a person or a scripted expert did, where it succeeded.
DEMONSTRATIONS = Selection(authors=frozenset({AUTHOR_HUMAN, AUTHOR_EXPERT}), outcomes=_SUCCEEDED)

# What was done in deployment, where it succeeded: by the policy, and by people who took over from it. What they did in
# vain is left to `CORRECTED`: of that nothing says that it is better than what the policy does. Tasks without any keep
# their demonstrations.
DEPLOYED = Selection(
    authors=frozenset({AUTHOR_POLICY, AUTHOR_HUMAN}),
    outcomes=_SUCCEEDED,
    beside=AUTHOR_POLICY,
    otherwise=DEMONSTRATIONS,
)

# Demonstrations, and what people did when they took over from a policy: whether the episode was saved by it or not, it
# shows what should have been done there.
CORRECTED = Selection(authors=frozenset({AUTHOR_HUMAN}), beside=AUTHOR_POLICY, also=DEMONSTRATIONS)

# The same, and all else that succeeded, whoever did it.
CORRECTED_OR_SUCCEEDED = replace(CORRECTED, also=Selection(outcomes=_SUCCEEDED))
