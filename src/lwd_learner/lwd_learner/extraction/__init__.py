# SPDX-License-Identifier: Apache-2.0
"""Ways to make a policy out of a critic. Each is chosen by the type of its configuration."""

from __future__ import annotations

from lwd_learner.extraction.adjoint_matching import AdjointMatching
from lwd_learner.extraction.awr import AdvantageWeighted, AwrConfig
from lwd_learner.extraction.base import Extraction
from lwd_learner.extraction.best_of_n import BestOfN, BestOfNConfig
from lwd_learner.extraction.cloning import Cloning, CloningConfig
from lwd_learner.extraction.recap import AdvantageConditioned, RecapConfig
from lwd_learner.flow_actor import FlowActor
from lwd_learner.qam import QamConfig
from lwd_learner.value_learner import ValueLearner

ExtractionConfig = QamConfig | CloningConfig | AwrConfig | BestOfNConfig | RecapConfig


def make_extraction(config: ExtractionConfig, actor: FlowActor, values: ValueLearner) -> Extraction:
    """The extraction that `config` describes."""
    match config:
        case QamConfig():
            return AdjointMatching(actor, values, config)
        case CloningConfig():
            return Cloning(actor, values)
        case AwrConfig():
            return AdvantageWeighted(actor, values, config)
        case BestOfNConfig():
            return BestOfN(actor, values, config)
        case RecapConfig():
            return AdvantageConditioned(actor, values, config)
