"""Train mixers and selections from scratch in the small nets, several seeds each, against `full` and `random`."""

from saccade.measure.training.plan import Plan
from saccade.measure.training.train import train

__all__ = ["Plan", "train"]
