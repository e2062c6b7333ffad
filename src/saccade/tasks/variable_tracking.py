"""A chain of assignments scattered over a long text: each step has to be found before the next can be looked for."""

from __future__ import annotations

from saccade.core import rng
from saccade.tasks._needles import DEPTHS, NAMES, NeedleTask, Riddle, number


class VariableTracking(NeedleTask):
    """`VAR a = 12345` and `VAR b = VAR a` far apart in Moby-Dick; the model says what b is, and then what that is.

    In the manner of RULER's variable tracking (arXiv 2404.06654, section 3.2), with one hop, each step asked for: the
    default model cannot take a hop in silence, and finds two hops in 40 of 100 texts.
    """

    name = "variable-tracking"
    title = "chain of two assignments, question in the prompt"
    metric = "hit"
    query_aware = True
    chance = 1.1e-5
    spread = 0.4

    def riddle(self, index: int, seed: int) -> Riddle:
        random = rng.python("variable-tracking", seed, index)
        (first, last), value = random.sample(NAMES, 2), number(random)
        depth = DEPTHS[index % len(DEPTHS)]
        later = random.choice([d for d in DEPTHS if d != depth])
        return Riddle(
            intro="Variables are assigned in the text below. Keep track of them.\n\n",
            needles=((depth, f" VAR {first} = {value}."), (later, f" VAR {last} = VAR {first}.")),
            steps=(
                (f"\n\nFollow the variables. VAR {last} = VAR", f" {first}"),
                (f". VAR {first} =", f" {value}"),
            ),
            facts={"depth": depth, "depth_of_link": later},
        )
