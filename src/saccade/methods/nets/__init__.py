"""Two small nets with a slot for the layer that mixes tokens, so that any mixer or selection is trained in one way.

    LanguageModel(vocabulary=256, mixer="hip", budget=0.25)       a registered method: attention over what it selects
    LanguageModel(vocabulary=256, mixer=lambda slot: Mine(slot))  a layer of yours, made for each place in the net
"""

from saccade.methods.nets._attention import Attention
from saccade.methods.nets._biformer import BiFormers
from saccade.methods.nets._halonet import HaloNets
from saccade.methods.nets._models import LanguageModel, VisionModel
from saccade.methods.nets._slot import Spec, make_mixer

__all__ = ["Attention", "BiFormers", "HaloNets", "LanguageModel", "Spec", "VisionModel", "make_mixer"]
