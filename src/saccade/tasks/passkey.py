"""One number hidden in a long text; the question stands at the end of the prompt."""

from __future__ import annotations

from saccade.core import rng
from saccade.tasks._needles import DEPTHS, NeedleTask, Riddle, number


class Passkey(NeedleTask):
    """A five-digit key at five depths of Moby-Dick, asked for before the context is compressed."""

    name = "passkey"
    title = "pass key, question in the prompt"
    metric = "hit"
    query_aware = True
    chance = 1.1e-5
    spread = 0.2

    def riddle(self, index: int, seed: int) -> Riddle:
        key, depth = number(rng.python("passkey", seed, index)), DEPTHS[index % len(DEPTHS)]
        return Riddle(
            intro="A pass key is hidden in the text below. Remember it.\n\n",
            needles=((depth, f" The pass key is {key}. Remember it. {key} is the pass key."),),
            steps=(("\n\nWhat is the pass key? The pass key is", f" {key}"),),
            facts={"depth": depth},
        )
