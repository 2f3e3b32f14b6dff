"""The learners: each says how meta-parameters adapt to a task, and in which direction they improve."""

from __future__ import annotations

from metadist.algorithms.anil import ANIL
from metadist.algorithms.base import Algorithm, Moment, Plan, Rule, TaskResults
from metadist.algorithms.boil import BOIL
from metadist.algorithms.cavia import CAVIA
from metadist.algorithms.evolution import ES
from metadist.algorithms.imaml import IMAML
from metadist.algorithms.losses import Objective, outputs_for, resolve_objective
from metadist.algorithms.maml import MAML
from metadist.algorithms.mamlpp import MAMLPlusPlus
from metadist.algorithms.mann import MANN
from metadist.algorithms.matchingnet import MatchingNet
from metadist.algorithms.meta_sgd import MetaSGD
from metadist.algorithms.persistent import PES
from metadist.algorithms.protomaml import ProtoMAML
from metadist.algorithms.protonet import ProtoNet
from metadist.algorithms.reptile import Reptile
from metadist.algorithms.sequence import SequenceLearner
from metadist.algorithms.snail import SNAIL

BUILT_IN: dict[str, type[Algorithm]] = {
    "maml": MAML,
    "anil": ANIL,
    "boil": BOIL,
    "meta_sgd": MetaSGD,
    "mamlpp": MAMLPlusPlus,
    "cavia": CAVIA,
    "reptile": Reptile,
    "imaml": IMAML,
    "protomaml": ProtoMAML,
    "protonet": ProtoNet,
    "matchingnet": MatchingNet,
    "es": ES,
    "pes": PES,
    "mann": MANN,
    "snail": SNAIL,
}

__all__ = [
    "ANIL",
    "BOIL",
    "BUILT_IN",
    "CAVIA",
    "ES",
    "IMAML",
    "MAML",
    "PES",
    "MANN",
    "SNAIL",
    "Algorithm",
    "MAMLPlusPlus",
    "MatchingNet",
    "MetaSGD",
    "Moment",
    "Objective",
    "Plan",
    "ProtoMAML",
    "ProtoNet",
    "Reptile",
    "Rule",
    "SequenceLearner",
    "TaskResults",
    "outputs_for",
    "resolve_objective",
]
