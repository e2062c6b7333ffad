"""What a method is: a frozen dataclass whose fields are its options, with a card. One base for each family."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saccade.core.artefact import Artefact
from saccade.core.budget import FULL, Budget
from saccade.core.card import Card
from saccade.core.errors import BadOption, CannotRun, DoesNotCompose
from saccade.core.record import Notes, Table
from saccade.core.registry import get, split
from saccade.core.selection import Selection
from saccade.core.site import Seen, Site, State

if TYPE_CHECKING:
    from typing_extensions import Self

Pair = tuple[Float[Tensor, "r n d"], Float[Tensor, "r n d"]]  # keys and values

# the parts of a model's work that a method can own, in the order of the data flow; at most one owner each
PARTS = ("tokens", "steer", "prefill", "evict", "merge", "pack", "decode", "neurons", "observe")


@dataclass(frozen=True)
class Method:
    """Base of all methods.

    `artefact` is what calibration left; `attach` finds the one of the model at hand, a user may give another.
    `dated`: its state says from which token on it holds. When tokens are taken back the state is left to it.
    `foretold`: its card's reason against chunks is the prompt's length: told `Site.coming`, pieces are as one prompt.
    `by_position`: what its prefill computes depends on no query and no key: first tokens and a window, by head.

    Raises:
        BadOption: a value outside what the option allows.
    """

    card: ClassVar[Card]
    dated: ClassVar[bool] = False
    foretold: ClassVar[bool] = False
    by_position: ClassVar[bool] = False
    artefact: Artefact | None = field(default=None, kw_only=True, repr=False, compare=False)

    def __post_init__(self):
        for name, value in options(self).items():
            _check_value(self.card, name, value, _option_types(type(self))[name])

    @property
    def parts(self) -> tuple[str, ...]:
        """Which parts of the model's work this method takes over."""
        return ()

    @property
    def replays(self) -> bool:
        """Of one that chooses what is read after the prompt: whether over the same stored keys it does the same for
        each query, and asks nothing of the host; so that a graph can do it again."""
        return False

    def check(self, site: Site) -> list[str]:
        """Every reason why this method cannot run there; [] means it will."""
        return []

    def calibrate(self, model: Any, samples: Sequence[Tensor], progress: Any = None) -> Artefact:
        """Learn what this method needs from a model; `samples` are rows of token ids [1 n].

        Raises:
            CannotRun: this method learns nothing.
        """
        raise CannotRun(f"calibrate {self.card.name}", "it has nothing to learn", "Attach it as it is.")


def options(method: Method | type[Method] | type[Mixer]) -> dict[str, Any]:
    """Option names and values (of a class: its defaults), in the order they are written."""
    if isinstance(method, type) and issubclass(method, Mixer):
        keywords = inspect.signature(method).parameters.values()
        return {p.name: p.default for p in keywords if p.kind is inspect.Parameter.KEYWORD_ONLY}
    given = {f.name: f for f in dataclasses.fields(method) if f.name != "artefact"}
    if isinstance(method, type):
        return {n: (f.default_factory() if callable(f.default_factory) else f.default) for n, f in given.items()}  # type: ignore[misc]
    return {n: getattr(method, n) for n in given}


@functools.cache
def _option_types(method: type[Method]) -> dict[str, Any]:
    """Option names and the types they are annotated with. Read once: annotations are text, and compiling it is slow."""
    return typing.get_type_hints(method)


def configure(method: Method, changes: Mapping[str, Any]) -> Method:
    """The same method with some options changed; text is read as the option's own type.

    Raises:
        BadOption: no such option (the nearest is said), or a value it does not allow.
    """
    hints = _option_types(type(method))
    known = options(method)
    out = {}
    for name, value in changes.items():
        _check_known(method, name, known)
        out[name] = _read(method, name, value, hints[name]) if isinstance(value, str) else value
    return dataclasses.replace(method, **out)


def _check_known(of: Method | type[Mixer], name: str, known: Mapping[str, Any]) -> None:
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        meant = f"Did you mean {close[0]!r}? " if close else ""
        asked = f"option {name!r} of {of.card.name}"
        raise BadOption(asked, "there is none of that name", f"{meant}It has: {', '.join(known)}.")


def _read(of: Method | type[Mixer], name: str, text: str, hint: Any) -> Any:
    kinds = typing.get_args(hint) if typing.get_origin(hint) not in (None, Literal) else (hint,)
    for kind in kinds:
        if typing.get_origin(kind) is Literal:
            known = {str(value): value for value in typing.get_args(kind)}
            if text in known:
                return known[text]
        elif kind is type(None):
            if text.lower() == "none":
                return None
        elif kind is bool:
            if text.lower() in ("true", "false"):
                return text.lower() == "true"
        elif kind in (int, float, str):
            try:
                return kind(text)
            except ValueError:
                continue
    raise BadOption(f"{of.card.name}.{name}={text!r}", f"it takes {_say(hint)}", "Give such a value.")


def _say(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return " or ".join(repr(a) for a in typing.get_args(hint))
    return getattr(hint, "__name__", str(hint))


def _check_value(card: Card, name: str, value: Any, hint: Any) -> None:
    if typing.get_origin(hint) is Literal and value not in typing.get_args(hint):
        raise BadOption(f"{card.name}.{name}={value!r}", f"it takes {_say(hint)}", "Give one of these.")
    if hint is bool and not isinstance(value, bool):
        raise BadOption(f"{card.name}.{name}={value!r}", "it takes True or False", "Give one of these.")
    wrong = isinstance(value, bool) or not isinstance(value, int)
    if hint is int and (wrong or value < 0):
        raise BadOption(f"{card.name}.{name}={value!r}", "it takes a whole number from 0", "Give such a number.")


@dataclass(frozen=True)
class Sparse(Method):
    """Chooses which (query, key) pairs are computed, in the prefill and, where it says so, in decoding."""

    @property
    def parts(self) -> tuple[str, ...]:
        return ("prefill",)

    def check(self, site: Site) -> list[str]:
        if site.budget.unit == "bytes":
            unit = f"the budget {site.budget} is in bytes"
            return [f"it leaves out pairs, not memory, and {unit}; give a fraction or tokens"]
        return []

    def select(self, q: Float[Tensor, "b h q d"], k: Float[Tensor, "b g k d"], site: Site) -> Selection:
        """Where these queries look."""
        raise NotImplementedError

    def attend(
        self, q: Float[Tensor, "b h q d"], k: Float[Tensor, "b g k d"], v: Float[Tensor, "b g k d"], site: Site
    ) -> Float[Tensor, "b h q d"]:
        """Attention over the selection. Override to add a remainder to it."""
        return site.attend(q, k, v, self.select(q, k, site))


@dataclass(frozen=True)
class Cache(Method):
    """Decides what the cache remembers. Four separable parts; most papers override one.

    `rolling`: evict after every forward by `visible`; otherwise once, at the end of the prompt, by `score`. A rolling
    method that leaves the prefill alone does both: what is left of the prompt is scored at its end.
    `weighing`: evict by `score` at the end of the prompt and again after every token, which is then the one query seen.
    Such tokens are read one at a time, and cannot be taken back. Every head must keep as many keys.
    `tallies`: keep a number beside each stored key, from 0, to which `tally` adds what each query thinks of it.
    `marks`: `mark` says which stored keys matter: of the prompt before it is read, so that `select` and `score` find it
    in `site.marks`. One that also packs does so with `pack_apart` and `read`: the whole prompt at its end, as one unit,
    later tokens `unit_tokens` at a time, marked by the newest of them. The heads of a sequence share their marks.
    """

    rolling: ClassVar[bool] = False
    weighing: ClassVar[bool] = False
    tallies: ClassVar[bool] = False
    marks: ClassVar[bool] = False

    @property
    def parts(self) -> tuple[str, ...]:
        return ("evict",)

    @property
    def observe_tokens(self) -> int:
        """How many of the last queries `score` wants to see."""
        return 0

    def score(self, seen: Seen, site: Site) -> Float[Tensor, "b g k"]:
        """Worth of each stored key, float32; higher is kept, +inf always."""
        raise NotImplementedError

    def allocate(self, scores: Float[Tensor, "b g k"], budget: Budget, site: Site) -> Int[Tensor, "b g"]:
        """Keys each head may keep. Default: the same for all."""
        b, g, k = scores.shape
        return torch.full((b, g), min(k, budget.tokens(site.seen, site.bytes_per_token)), dtype=torch.long)

    def tally(self, q: Float[Tensor, "r s q d"], k: Float[Tensor, "r k d"], site: Site) -> Float[Tensor, "r k"]:
        """What the last `q` of the stored tokens add to the tally of each key, float32 or better; causal.

        Rows are (sequence, key/value head) pairs with their query heads. A prompt may come in several pieces.
        """
        raise NotImplementedError

    def visible(
        self, q_position: Int[Tensor, "r q"], k_position: Int[Tensor, "r k"], head: Int[Tensor, " r"], site: Site
    ) -> Bool[Tensor, "r q k"] | None:
        """Which stored keys a query may still see, where eviction depends on the query's position; None: all.

        Rows are (sequence, key/value head) pairs, and so are the rows of `site.state` here. It lets many tokens be read
        in one forward with the same result as one at a time.
        """
        return None

    def reach(self, queries: Sequence[int], site: Site) -> list[list[tuple[int, int]]] | None:
        """The same in numbers, where the rule is sinks and recent tokens: how many first tokens, and how many before
        itself, the query at a position sees. One position and one row of `site.state` for each sequence; a pair for
        each of its key/value heads. None: `visible` has to be asked, and the device with it. Of a method that scores
        the prompt at its end, what the first query after it reaches is what was kept.
        """
        return None

    @property
    def merges(self) -> bool:
        """Whether keys that stay take over from those that go. Only then `merge` and `stands_for` are asked."""
        return False

    def merge(
        self,
        k: Float[Tensor, "r k d"],
        v: Float[Tensor, "r k d"],
        k_position: Int[Tensor, "r k"],
        stays: Bool[Tensor, "r k"],
    ) -> tuple[Float[Tensor, "r k d"], Float[Tensor, "r k d"]]:
        """Keys and values with what goes merged into what stays; what is given back for a key that goes is not read.

        Asked when something goes, in every row or in some. Of a rolling method, merging at once must equal merging
        piece by piece: it lets many tokens be read in one forward.
        """
        return k, v

    def stands_for(
        self, k_position: Int[Tensor, "r k"], stays: Bool[Tensor, "r k"] | None
    ) -> tuple[Int[Tensor, "r m"], Int[Tensor, "r m"]] | None:
        """Keys that stand for several tokens: which of those that stay (None: all do), and for how many. Each counts so
        many times in the softmax, as if log(tokens) were added to its logits. None: every key counts once.
        """
        return None

    def packed_tokens(self, tokens: int) -> int:
        """Of a method that owns "pack": how many first ones of so many stored tokens lie packed, in whole units.

        It never falls as tokens come. From the end of the prompt on it is so after every token.
        """
        raise NotImplementedError

    def pack(self, k: Float[Tensor, "r n d"], v: Float[Tensor, "r n d"]) -> dict[str, Tensor]:
        """Keys and values of some whole units, as columns [r u ...]; those of later units are put behind them."""
        raise NotImplementedError

    def unpack(self, packed: Mapping[str, Tensor]) -> tuple[Float[Tensor, "r n d"], Float[Tensor, "r n d"]]:
        """Keys and values that some units stand for."""
        raise NotImplementedError

    @property
    def unit_tokens(self) -> int:
        """Of a method that marks and packs: tokens after the prompt that are packed together."""
        raise NotImplementedError

    def mark(self, q: Float[Tensor, "b h q d"], k: Float[Tensor, "b g k d"], site: Site) -> Bool[Tensor, "b k"]:
        """Which of these keys matter. In the prompt: all there are, by the queries of the newest; what `site.state`
        holds is forgotten at its end. Later: those of a unit, by the query of its last token.
        """
        raise NotImplementedError

    def pack_apart(self, marked: Pair, others: Pair) -> dict[str, Tensor]:
        """Keys and values [r n d] of one unit, those marked and the others, as columns; those of later units are put
        behind them, each column's behind its own.
        """
        raise NotImplementedError

    def read(
        self, q: Float[Tensor, "r s q d"], packed: Mapping[str, Tensor], *, scale: float, softcap: float | None
    ) -> tuple[Float[Tensor, "r s q d"], Float[Tensor, "r s q"]]:
        """Attention of every query over all that such columns stand for: output and log-sum-exp."""
        raise NotImplementedError

    def select(self, q: Float[Tensor, "b h q d"], k: Float[Tensor, "b g k d"], site: Site) -> Selection | None:
        """For a method that also owns "prefill": the pairs its prefill computes. None: dense."""
        return None


@dataclass(frozen=True)
class Decode(Method):
    """Chooses which stored keys each new query reads; everything stays stored.

    `persistent`: what one layer chooses serves others, handed on through `site.handed`; it composes with no eviction,
    which may leave each layer other keys.
    `shelves`: what it need not have at hand lies in host memory after the prompt. It composes with no eviction either.
    """

    persistent: ClassVar[bool] = False
    shelves: ClassVar[bool] = False

    @property
    def parts(self) -> tuple[str, ...]:
        return ("decode",)

    @property
    def reread_tokens(self) -> int:
        """Tokens read after the prompt until they are read again as if they were prompt, and anew; 0: never.

        What a sparse read leaves in the cache is then what a dense one leaves. It happens between two forwards.
        """
        return 0

    @property
    def observe_tokens(self) -> int:
        """How many of the last prompt queries `begin`, or `shelve`, wants to see; 0: it is not asked."""
        return 0

    def begin(self, seen: Seen, site: Site) -> None:
        """At the end of the prompt, after any eviction: put into `site.state` what later queries go by."""
        raise NotImplementedError

    def shelve(self, seen: Seen, site: Site) -> tuple[int, Sequence[Any]] | None:
        """Of a method that `shelves`, in the place of `begin`: the first stored token that goes to host memory, and for
        each sequence an index over the keys that do, as `ops.index_keys` makes it. None: all stay.
        """
        raise NotImplementedError

    def index(self, k: Float[Tensor, "b g n d"], site: Site) -> dict[str, Tensor]:
        """Columns [b g n ...] that are stored beside these new keys and follow them everywhere."""
        return {}

    def refresh(self, stored: Mapping[str, Tensor], site: Site) -> None:
        """Bring `site.state` up to date: the last `site.queries` of what is stored are new, and `select` was not asked.
        """

    def select(self, q: Float[Tensor, "b h q d"], stored: Mapping[str, Tensor], site: Site) -> Selection:
        """Keys that each of these queries reads; `stored` holds [b g k ...]: "keys", "values", their true "positions",
        ascending, and the columns of `index`. What lies in `site.far` is not among them, though `site.keys` counts it;
        a `Gather` names it in its `index` only.
        """
        raise NotImplementedError


class _Planned(Method):
    """Families whose attachment comes with their first method; the contract is settled, the engine refuses them."""


@dataclass(frozen=True)
class Tokens(_Planned):
    """Decides which (visual) tokens go on."""

    @property
    def parts(self) -> tuple[str, ...]:
        return ("tokens",)

    def reduce(self, tokens: Float[Tensor, "b n c"], site: Site) -> Int[Tensor, "b m"]:
        """Indices of the tokens that go on."""
        raise NotImplementedError


@dataclass(frozen=True)
class Steer(_Planned):
    """Edits logits, maps, head outputs or the residual stream at declared sites; the shape is kept."""

    @property
    def parts(self) -> tuple[str, ...]:
        return ("steer",)

    def edit(self, x: Tensor, site: Site) -> Tensor:
        """The edited tensor, of the same shape."""
        raise NotImplementedError


@dataclass(frozen=True)
class Neurons(_Planned):
    """Leaves out neurons, experts or weights."""

    @property
    def parts(self) -> tuple[str, ...]:
        return ("neurons",)

    def pick(self, activations: Float[Tensor, "b n f"], site: Site) -> Int[Tensor, " m"]:
        """Indices of the neurons that stay."""
        raise NotImplementedError


@dataclass(frozen=True)
class Probe(Method):
    """Reads only: where heads look. The model computes what it computes without it, bit for bit.

    What `see` notes of a token is kept beside the model's own cache: it follows beams, and goes when the token is taken
    back. `result` makes a table of it; what many runs come to is an artefact, which `calibrate` makes.
    """

    @property
    def parts(self) -> tuple[str, ...]:
        return ("observe",)

    def see(self, seen: Seen, site: Site) -> dict[str, Tensor]:
        """Notes [b h q ...] on the tokens just read in one layer, under the same names in every forward.

        `seen` holds the queries of these tokens and all keys and values there are. Notes are numbers, small ones: they
        are kept for every token.
        """
        raise NotImplementedError

    def result(self, notes: Sequence[Notes]) -> Table:
        """What the notes on some sequences come to: one line per layer and head."""
        raise NotImplementedError


@dataclass(frozen=True)
class Slot:
    """Where a mixer stands in a net, and all that the net tells it.

    channels, heads: of the tokens it is given, and how many heads share them
    causal: no token may see a later one. grid: rows and columns of a picture whose cells the tokens are; None: a line
    layer, layers: which of how many
    budget, seed: for those that choose pairs or draw; the others have sizes among their options
    """

    channels: int
    heads: int = 4
    causal: bool = True
    layer: int = 0
    layers: int = 1
    grid: tuple[int, int] | None = None
    budget: Budget = FULL
    seed: int = 0

    def __post_init__(self):
        if min(self.channels, self.heads) < 1 or self.channels % self.heads:
            found = "the channels are not shared out evenly"
            raise BadOption(f"{self.channels} channels in {self.heads} heads", found, "Give a multiple of the heads.")


class Mixer(torch.nn.Module):
    """A trainable layer that mixes tokens, x [b n c] to y [b n c]. Its forms agree: `forward`, `step`, `reference`.

    It is made as `TheMixer(slot, option=...)`: options are keywords of its constructor. A state is a dictionary of
    tensors with the batch first, so that it follows beams; what `forward` gives back is where `step` goes on.
    """

    card: ClassVar[Card]

    def __new__(cls, *_: Any, **given: Any) -> Self:
        """Checks the options, of whatever layer.

        Raises:
            BadOption: a value outside what the option allows.
        """
        hints, known = typing.get_type_hints(cls.__init__), options(cls)
        for name in given.keys() & known:
            _check_value(cls.card, name, given[name], hints[name])
        return super().__new__(cls)

    def __init__(self, slot: Slot):
        super().__init__()
        self.slot = slot

    def forward(
        self, x: Float[Tensor, "b n c"], state: State | None = None, lengths: Int[Tensor, " b"] | None = None
    ) -> tuple[Float[Tensor, "b n c"], State]:
        """What comes of these tokens, behind those that the state stands for; differentiable.

        lengths: real tokens of each row, the rest is padding behind them, of which nothing comes; None: all are real
        """
        raise NotImplementedError

    def step(self, x: Float[Tensor, "b c"], state: State) -> tuple[Float[Tensor, "b c"], State]:
        """One token of each row, with the state so far; {}: the first. Default: `forward` over one.

        Raises:
            CannotRun: its tokens see later ones.
        """
        if not self.slot.causal:
            found = "tokens see later ones in this net, which are not there yet"
            raise CannotRun(f"a step of {self.card.name}", found, "Give it all tokens at once.")
        y, state = self.forward(x[:, None], state)
        return y[:, 0], state

    def reference(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """The paper's equation over whole rows, loop and all, with the weights of this layer."""
        raise NotImplementedError

    def density(self) -> float | None:
        """Share of all pairs that the newest forward computed, mean over heads; None: it chooses none, or read nothing.
        """
        return None


def place(mixer: type[Mixer], slot: Slot, changes: Mapping[str, Any]) -> Mixer:
    """A mixer made for a slot, with some options changed; text is read as the option's own type.

    Raises:
        BadOption: no such option (the nearest is said), or a value it does not allow.
    """
    hints, known = typing.get_type_hints(mixer.__init__), options(mixer)
    for name in changes:
        _check_known(mixer, name, known)
    read = {n: _read(mixer, n, x, hints[n]) if isinstance(x, str) else x for n, x in changes.items()}
    return mixer(slot, **read)


def made(text: str) -> Method:
    """The method of "NAME" or "NAME:OPTION=VALUE,...", to be attached.

    Raises:
        UnknownName: nobody has a method of that name. BadOption: no such option, or a value it does not take.
        CannotRun: it is a layer.
    """
    name, changes = split(text)
    kind = get(name)
    if issubclass(kind, Mixer):
        found = "it is a layer that is trained, with weights of its own"
        raise CannotRun(f"use {name!r} in a loaded model", found, f"Train it: saccade train --mixer {name}")
    return configure(kind(), changes)


def compose(methods: Iterable[Method]) -> dict[str, Method]:
    """part -> its owner, in the order of the data flow.

    Raises:
        DoesNotCompose: two methods need the same part, or one counts on keys that another drops, merges or packs; both
            are named.
    """
    owners: dict[str, Method] = {}
    for method in methods:
        for part in method.parts:
            if part in owners:
                a, b = owners[part].card.name, method.card.name
                raise DoesNotCompose(
                    f"attach [{a}, {b}] together", f"both need the part {part!r}", "Leave one of them out."
                )
            owners[part] = method
    _check_reader(owners.get("decode"), owners.get("evict"))
    _check_packer(owners.get("pack"), owners.get("decode"), owners.get("evict"))
    return {part: owners[part] for part in PARTS if part in owners}


def _check_reader(reader: Method | None, evictor: Method | None) -> None:
    """What chooses keys to read may count on all of them being there, and knows only keys that are one token each."""
    if reader is None or evictor is None or reader is evictor:
        return
    a, b = reader.card.name, evictor.card.name
    if isinstance(reader, Decode) and (reader.persistent or reader.reread_tokens or reader.shelves):
        found = f"{a!r} counts on all keys being there in every layer, and {b!r} drops some"
        raise DoesNotCompose(f"attach [{a}, {b}] together", found, "Leave one of them out.")
    if isinstance(evictor, Cache) and evictor.merges:
        found = f"{b!r} stores keys that stand for several tokens, and {a!r} would read each as one"
        raise DoesNotCompose(f"attach [{b}, {a}] together", found, "Leave one of them out.")


def _check_packer(packer: Method | None, reader: Method | None, evictor: Method | None) -> None:
    """What is packed is read as a whole, and stays."""
    if packer is None:
        return
    a = packer.card.name
    if reader is not None:
        b = reader.card.name
        found = f"{b!r} chooses among the keys as they are, and {a!r} packs them"
        raise DoesNotCompose(f"attach [{b}, {a}] together", found, "Leave one of them out.")
    if isinstance(evictor, Cache) and (evictor.rolling or evictor.merges):
        b = evictor.card.name
        found = f"{b!r} goes on dropping or merging single tokens, and {a!r} packs many together"
        raise DoesNotCompose(f"attach [{b}, {a}] together", found, "Leave one of them out.")
