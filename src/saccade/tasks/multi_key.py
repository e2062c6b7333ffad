"""Several numbers hidden in a long text, one of them asked for: attention must find the right one, not any."""

from __future__ import annotations

from saccade.core import rng
from saccade.tasks._needles import DEPTHS, NAMES, NeedleTask, Riddle, number

KEYS = 4


class MultiKey(NeedleTask):
    """Four animals with a pass key each, at four depths of Moby-Dick; the key of one is asked for.

    In the manner of RULER's multi-key needles (arXiv 2404.06654, section 3), with fewer keys and shorter numbers, since
    the default model is small.
    """

    name = "multi-key"
    title = "one of four pass keys, question in the prompt"
    metric = "hit"
    query_aware = True
    chance = 0.25
    spread = 0.4

    def riddle(self, index: int, seed: int) -> Riddle:
        random = rng.python("multi-key", seed, index)
        depths = [DEPTHS[(index + i) % len(DEPTHS)] for i in range(KEYS)]
        keys = {name: number(random) for name in random.sample(NAMES, KEYS)}
        asked = next(iter(keys))
        said = [f" The pass key of the {name} is {key}." for name, key in keys.items()]
        return Riddle(
            intro="Pass keys are hidden in the text below. Remember them.\n\n",
            needles=tuple(zip(depths, said)),
            steps=((f"\n\nWhat is the pass key of the {asked}? The pass key of the {asked} is", f" {keys[asked]}"),),
            facts={"depth": depths[0], "keys": KEYS},
        )
