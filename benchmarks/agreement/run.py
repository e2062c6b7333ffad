"""Do other implementations of the same methods choose the same keys? Ours beside kvpress, MInference and transformers'
quantised cache, on the same model and the same prompts.

    python -m venv benchmarks/agreement/.venv
    benchmarks/agreement/.venv/bin/pip install -r benchmarks/agreement/requirements.txt    # it names one step more
    python benchmarks/agreement/run.py                                   # all methods, and their table
    python benchmarks/agreement/run.py --only snapkv tova --json FILE    # some; stored too, beside what FILE has
    python benchmarks/agreement/run.py --show benchmarks/results --markdown docs/agreement.md    # fill the page

Prompts are passages of Moby-Dick, the model is SmolLM2-135M in float32. The peers run in an environment of their own,
since their pins and ours exclude each other: the model and the prompts are handed over as files (peer.py), and what
they scored, kept and answered comes back. Compared per text, layer and key/value head: Spearman's rank correlation of
scores, the kept keys, and the answers to the tokens that follow.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from saccade import models, tasks
from saccade.attach import attach, calibration, fingerprint
from saccade.attach.compat import CACHE
from saccade.core.budget import Budget
from saccade.core.method import Method
from saccade.core.site import Site
from saccade.measure.contestants import parse
from saccade.measure.environment import environment

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results"
STEPS = 4  # tokens after the prompt whose answers are compared
Found = dict[str, Tensor]


@dataclass(frozen=True)
class Pair:
    """One method of ours, and what it is compared with.

    ours: as `saccade compare` reads it
    job: what peer.py is asked for; `said` names it
    budget: of ours; the job says the peer's
    sure: first and last keys that are kept by rule, whose scores are not ranked
    undo: of the peer's scores, so that both mean the same
    steps: tokens after the prompt that both read under the same rule
    why: what explains where they differ
    """

    ours: str
    job: dict[str, Any]
    said: str
    why: str
    budget: float | str = 1.0
    sure: tuple[int, int] = (0, 0)
    undo: Callable[[Tensor], Tensor] = field(default=lambda scores: scores, repr=False)
    steps: int = STEPS

    @property
    def method(self) -> str:
        """Name of ours."""
        return self.ours.partition(":")[0]


@dataclass(frozen=True)
class Plan:
    """What holds for all pairs."""

    prompt: int
    keep: float

    def press(self, name: str, **options: Any) -> dict[str, Any]:
        """A job for a press that keeps this share of the prompt."""
        return {"press": name, "options": {"compression_ratio": 1 - self.keep, **options}, "steps": STEPS}


# --- one function for each method ---------------------------------------------------------------------------------


def full(plan: Plan) -> list[Pair]:
    job = {"steps": STEPS}
    return [Pair("full", job, "no press", "Nothing is attached: two versions of transformers. No row can be closer.")]


def knorm(plan: Plan) -> list[Pair]:
    return [Pair("knorm", plan.press("KnormPress"), "KnormPress", "The same rule.", plan.keep)]


def snapkv(plan: Plan) -> list[Pair]:
    job = plan.press("SnapKVPress")
    usual = "The peer's options are not ours, which are the authors': a window of 64 for 32, mean pooling over 5 for"
    return [
        Pair("snapkv:window_tokens=64,pool_tokens=5,pooling=avg", job, "SnapKVPress", "The same rule.", plan.keep,
             (0, 64)),
        Pair("snapkv", job, "SnapKVPress", f"{usual} maximum over 7.", plan.keep, (0, 64)),
    ]  # fmt: skip


def pyramidkv(plan: Plan) -> list[Pair]:
    job = plan.press("PyramidKVPress", window_size=8, beta=10)
    why = (
        "The same scores; the peer's line of counts includes the window, ours begins beside it, so that lower layers"
        " keep fewer here and higher ones more. With its own window of 64 the peer shares out evenly at this budget."
    )
    said = "PyramidKVPress(window_size=8, beta=10)"
    return [Pair("pyramidkv:pool_tokens=5,pooling=avg,beta=10", job, said, why, plan.keep, (0, 8))]


def adakv(plan: Plan) -> list[Pair]:
    inner = plan.press("SnapKVPress", window_size=32, kernel_size=7)

    def job(alpha: float) -> dict[str, Any]:
        return {"press": "AdaKVPress", "options": {"alpha_safeguard": alpha}, "around": inner, "steps": STEPS}

    why = (
        "The peer sets a fifth of the even share aside for each head and lets all heads compete for the rest; ours, as"
        " the authors', mixes what a head would win with the even share."
    )
    ours = "adakv:pooling=avg"
    return [
        Pair(f"{ours},safeguard=0", job(0.0), "AdaKVPress(SnapKVPress(32, 7), 0)", "The same rule.", plan.keep,
             (0, 32)),
        Pair(ours, job(0.2), "AdaKVPress(SnapKVPress(32, 7))", why, plan.keep, (0, 32)),
    ]  # fmt: skip


def tova(plan: Plan) -> list[Pair]:
    why = "The peer never drops the newest key; here, as in the paper, it goes like any other."
    return [Pair("tova", plan.press("TOVAPress"), "TOVAPress", why, plan.keep, (0, 1), steps=1)]


def h2o(plan: Plan) -> list[Pair]:
    job = plan.press("ObservedAttentionPress") | {"attention": "eager"}
    why = (
        "The peer divides each sum by the number of queries that saw the key, which favours late keys, and keeps no"
        " window of recent ones."
    )
    later = torch.arange(plan.prompt, 0, -1)
    undone = f"{why} Its scores are multiplied by that number before they are ranked."
    return [
        Pair("h2o:heavy_share=1", job, "ObservedAttentionPress, sums", undone, plan.keep, undo=lambda s: s * later,
             sure=(0, 1), steps=1),
        Pair("h2o", job, "ObservedAttentionPress", why, plan.keep, (0, int(plan.prompt * plan.keep / 2)), steps=1),
    ]  # fmt: skip


def expected_attention(plan: Plan) -> list[Pair]:
    job = plan.press("ExpectedAttentionPress")
    return [Pair("expected-attention", job, "ExpectedAttentionPress", "The same rule.", plan.keep, (4, 0))]


def streaming(plan: Plan) -> list[Pair]:
    why = "The same keys; here the prompt is computed under the same rule, so the answers are others."
    return [Pair("streaming", plan.press("StreamingLLMPress"), "StreamingLLMPress", why, plan.keep, steps=1)]


def duo_attention(plan: Plan) -> list[Pair]:
    why = "The same keys from the same gates; both prompts are computed densely."
    options = {"sink_size": 16, "recent_size": 64}
    job = {"press": "DuoAttentionPress", "options": options, "steps": 1}
    fly = {"heads": "on the fly"}
    quick = (
        "The peer's quick estimate, which its authors call experimental: attention of the mean query over distances."
        " Ours are gates trained on recall, as in the paper. Ranked over all heads of the model."
    )
    return [
        Pair("duo-attention:prefill=dense", job, "DuoAttentionPress, our gates", why, plan.keep, steps=1),
        Pair("duo-attention", fly, "duo_attention_on_the_fly", quick, plan.keep),
    ]


def quest(plan: Plan) -> list[Pair]:
    job = {"reads": "quest", "options": {"chunk_size": 16, "token_budget": int(plan.prompt * plan.keep)}}
    why = (
        "The same bounds and pages; here the newest page is always read, there it competes. Each query head chooses for"
        " itself, as in the peer; by default those of a key/value head choose together here."
    )
    said = "MInference's quest_decode_kernel, pages of 16"
    return [Pair("quest:group=per-head,dense_layers=0", job, said, why, plan.keep)]


def kivi(plan: Plan) -> list[Pair]:
    options = {"nbits": 2, "axis_key": -1, "axis_value": 0, "q_group_size": 32, "residual_length": 128}
    job = {"cache": "quanto", "options": options, "steps": STEPS}
    why = (
        "The same groups and codes. The peer packs the whole prompt and, when its residual is full, everything again;"
        " the authors and ours keep the newest tokens exact, which is turned off here."
    )
    return [Pair("kivi:residual_tokens=0", job, "QuantizedCache(quanto, 2 bits, groups of 32)", why)]


METHODS = {
    "full": full, "knorm": knorm, "snapkv": snapkv, "pyramidkv": pyramidkv, "adakv": adakv, "tova": tova, "h2o": h2o,
    "expected-attention": expected_attention, "streaming": streaming, "duo-attention": duo_attention, "quest": quest,
    "kivi": kivi,
}  # fmt: skip


# --- ours ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def listening(kind: type) -> Iterator[dict[int, Tensor]]:
    """Scores of a method at the end of the prompt, by layer."""
    held: dict[int, Tensor] = {}
    plain = kind.score

    def score(self: Any, seen: Any, site: Any) -> Tensor:
        found = plain(self, seen, site)
        held.setdefault(site.layer, found.clone())
        return found

    kind.score = score
    try:
        yield held
    finally:
        kind.score = plain


@torch.no_grad()
def answers(model: Any, cache: Any, after: Tensor) -> Float[Tensor, "m vocab"]:
    """Logits after each token, read one by one."""
    rows = [model(token, **{CACHE: cache}, use_cache=True).logits[0, -1] for token in after.view(-1, 1, 1)]
    return torch.stack(rows)


@torch.no_grad()
def ours(model: Any, pair: Pair, prompts: Tensor, following: Tensor) -> Found:
    """What ours scores [t layers g n], keeps [t layers g n] and answers [t m vocab]."""
    methods = parse(pair.ours).equipped(fingerprint(model)).methods
    out: dict[str, list[Tensor]] = {}
    for ids, after in zip(prompts, following):
        with contextlib.ExitStack() as stack:
            held = stack.enter_context(listening(type(methods[0]))) if hasattr(methods[0], "score") else {}
            run = stack.enter_context(attach(model, list(methods), budget=pair.budget))
            cache = model(ids[None], use_cache=True)[CACHE]
            kept = [run.record.layer(i).kept[0] for i in sorted(run.record.layers)]
            found = {"kept": torch.stack([masks(heads, len(ids)) for heads in kept])} if kept else {}
            found["logits"] = answers(model, cache, after[: pair.steps])
        if held:
            found["scores"] = torch.cat([held[i] for i in sorted(held)])
        for name, x in found.items():
            out.setdefault(name, []).append(x)
    return {name: torch.stack(rows) for name, rows in out.items()}


def masks(heads: Sequence[Tensor], keys: int) -> Bool[Tensor, "g n"]:
    """Kept positions of each head as a mask."""
    out = torch.zeros(len(heads), keys, dtype=torch.bool)
    for row, positions in zip(out, heads):
        row[positions.long()] = True
    return out


def chosen(model: Any, pair: Pair, inputs: Found) -> Found:
    """Keys that the last query of every prompt reads, [t layers h n]."""
    (method,) = parse(pair.ours).methods
    place = calibration.Subject(model).found.sites[0].place
    rows = []
    for queries, keys in zip(inputs["queries"], inputs["keys"]):
        n = keys.shape[2]
        at = Site(**asdict(place), stage="decode", queries=1, keys=n, seen=n, budget=Budget.of(pair.budget))
        positions = torch.arange(n, dtype=torch.int32).expand(1, keys.shape[1], n)
        found = []
        for i, (q, k) in enumerate(zip(queries, keys)):
            here = {"keys": k[None], "values": k[None], "positions": positions}
            found.append(method.select(q[None], here, replace(at, layer=i, state={})))  # a state holds bounds of pages
        rows.append(torch.stack([selection.mask()[0, :, 0] for selection in found]))
    return {"kept": torch.stack(rows)}


def captured(model: Any, prompts: Tensor) -> Found:
    """Of every prompt and layer the last token's queries, and all keys."""
    out: dict[str, list[Tensor]] = {"queries": [], "keys": []}
    for ids in prompts:
        layers = [(q[0, :, -1:], k[0]) for _, q, k, _ in calibration.Subject(model).capture_qkv([ids[None]])]
        for i, name in enumerate(out):
            out[name].append(torch.stack([layer[i] for layer in layers]))
    return {name: torch.stack(rows) for name, rows in out.items()}


def stored(model: Any, method: Any, prompts: Tensor) -> Found:
    """Keys and values [t layers g n d] as a packing method reads them back."""
    out: dict[str, list[Tensor]] = {"keys": [], "values": []}
    for ids in prompts:
        layers = [(k[0], v[0]) for _, _, k, v in calibration.Subject(model).capture_qkv([ids[None]])]
        read = [method.unpack(method.pack(k, v)) for k, v in layers]
        for i, name in enumerate(out):
            out[name].append(torch.stack([pair[i] for pair in read]))
    return {name: torch.stack(rows) for name, rows in out.items()}


# --- how far two agree --------------------------------------------------------------------------------------------


def ranks(x: Float[Tensor, "... n"]) -> Float[Tensor, "... n"]:
    """Places from 0; equal numbers share the mean of theirs."""
    out = torch.empty(x.shape, dtype=torch.float64)
    for row, to in zip(x.reshape(-1, x.shape[-1]), out.view(-1, x.shape[-1])):
        _, place, counts = row.unique(return_inverse=True, return_counts=True)
        to.copy_((counts.cumsum(0) - (counts + 1) / 2).double()[place])
    return out


def rank_correlation(a: Float[Tensor, "... n"], b: Float[Tensor, "... n"]) -> Tensor:
    """Spearman's, along the last axis."""
    a, b = (ranks(x) - (x.shape[-1] - 1) / 2 for x in (a, b))
    return (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()


def shared(a: Bool[Tensor, "... n"], b: Bool[Tensor, "... n"]) -> Tensor:
    """Keys in both, over those of the larger set: 1 only where the sets are the same."""
    return (a & b).sum(-1).double() / torch.maximum(a.sum(-1), b.sum(-1))


def contested(scores: Float[Tensor, "... n"], a: Bool[Tensor, "... n"], b: Bool[Tensor, "... n"]) -> Tensor:
    """How far apart the scores are of keys that only one keeps, over the largest; 0: the same sets, 1: kept by rule."""
    apart = a ^ b
    most = scores.masked_fill(~apart, -torch.inf).amax(-1).double()
    least = scores.masked_fill(~apart, torch.inf).amin(-1).double()
    far = (most - least) / torch.maximum(most.abs(), least.abs())
    return torch.where(apart.any(-1), far.nan_to_num(1.0), 0.0)


def divergence(a: Float[Tensor, "... vocab"], b: Float[Tensor, "... vocab"]) -> Tensor:
    """Kullback-Leibler, in nats, of what two answers say about the next token."""
    a, b = a.double().log_softmax(-1), b.double().log_softmax(-1)
    return (a.exp() * (a - b)).sum(-1)


def spread(x: Tensor) -> dict[str, float]:
    """Mean, least and most."""
    return {"mean": float(x.mean()), "least": float(x.min()), "most": float(x.max())}


def compared(pair: Pair, mine: Found, theirs: Found) -> dict[str, Any]:
    """The figures of a pair; those that there is nothing to take from are left out."""
    out: dict[str, Any] = {}
    if "scores" in mine and "scores" in theirs:
        first, last = pair.sure
        a, b = (x[..., first : x.shape[-1] - last] for x in (mine["scores"], pair.undo(theirs["scores"])))
        out["rank"] = spread(rank_correlation(a, b))
    if "gates" in theirs:
        out["rank"] = spread(rank_correlation(mine["gates"].flatten(), theirs["gates"].flatten()))
    if "kept" in mine and "kept" in theirs:
        out["shared"] = spread(shared(mine["kept"], theirs["kept"]))
        out["same"] = float((mine["kept"] == theirs["kept"]).all(-1).double().mean())
        if "scores" in mine:
            out["contested"] = spread(contested(mine["scores"], mine["kept"], theirs["kept"]))
        out["kept"] = [float(x["kept"].double().mean()) for x in (mine, theirs)]
    if "keys" in mine and "keys" in theirs:
        alike = [torch.isclose(mine[x], theirs[x], rtol=1e-4, atol=1e-5).double() for x in ("keys", "values")]
        out["alike"] = spread(torch.stack([x.mean((-2, -1)) for x in alike]))
    if "logits" in mine and "logits" in theirs:
        out["nats"] = spread(divergence(mine["logits"], theirs["logits"][:, : pair.steps]))
    return out


# --- the run ------------------------------------------------------------------------------------------------------


def texts(tokenizer: Any, count: int, tokens: int) -> Tensor:
    """Passages of Moby-Dick [count tokens]."""
    samples = tasks.get("continuation-loss").samples(tokenizer, tokens, count, 0)
    return torch.cat([torch.cat([s.context, s.continuation], 1) for s in samples])


def ask(folder: Path, python: Path, pairs: Sequence[Pair], inputs: Found, loaded: tuple[Any, Any]) -> None:
    """Let the peers answer in their environment; what they say lies in the folder then."""
    model, tokenizer = loaded
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    save_file({name: x.contiguous() for name, x in inputs.items()}, folder / "inputs.safetensors")
    (folder / "texts.json").write_text(json.dumps(tokenizer.batch_decode(inputs["prompts"])))
    (folder / "jobs.json").write_text(json.dumps({answer(pairs, pair): pair.job for pair in pairs}))
    threads = ["--threads", str(torch.get_num_threads())]
    subprocess.run([str(python), str(HERE / "peer.py"), str(folder), *threads], check=True)


def answer(pairs: Sequence[Pair], pair: Pair) -> str:
    """Name of what the peers said of a pair: the first with the same job, which is done once."""
    return str([other.job for other in pairs].index(pair.job))


def our_side(model: Any, pair: Pair, inputs: Found) -> Found:
    """All that of ours is compared in a pair."""
    method = next(iter(parse(pair.ours).equipped(fingerprint(model)).methods), None)
    if "reads" in pair.job:
        return chosen(model, pair, inputs)
    if "heads" in pair.job:
        return {"gates": inputs["gates"]}
    if method is None:
        return unattached(model, pair, inputs)
    found = ours(model, pair, inputs["prompts"], inputs["following"])
    return found | (stored(model, method, inputs["prompts"]) if "cache" in pair.job else {})


@torch.no_grad()
def unattached(model: Any, pair: Pair, inputs: Found) -> Found:
    """Logits of the model as it is."""
    rows = []
    for ids, after in zip(inputs["prompts"], inputs["following"]):
        cache = model(ids[None], use_cache=True, logits_to_keep=1)[CACHE]
        rows.append(answers(model, cache, after[: pair.steps]))
    return {"logits": torch.stack(rows)}


def gates(model: Any) -> Tensor:
    """Of our DuoAttention for this model [layers g]."""
    method: Method = parse("duo-attention").equipped(fingerprint(model)).methods[0]
    assert method.artefact is not None, "it is shipped for the default model"
    return method.artefact.tensors["gates"].float()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All pairs that are asked for."""
    disable_progress_bar()
    model, tokenizer = models.load("smollm2", dtype=torch.float32)
    ids = texts(tokenizer, args.texts, args.tokens + STEPS)
    inputs = {"prompts": ids[:, :-STEPS], "following": ids[:, -STEPS:], "gates": gates(model)}
    inputs |= captured(model, inputs["prompts"])
    plan = Plan(args.tokens, args.keep)
    pairs = [pair for name in args.only for pair in METHODS[name](plan)]
    rows = []
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        mine = []
        for pair in pairs:
            print(f"ours: {pair.ours}", flush=True)
            mine.append(our_side(model, pair, inputs))
        pairs = [with_our_heads(pair, found) for pair, found in zip(pairs, mine)]
        ask(folder, args.python, pairs, inputs, (model, tokenizer))
        for pair, found in zip(pairs, mine):
            row = {"method": pair.method, "ours": pair.ours, "peer": pair.said, "why": pair.why, "job": pair.job}
            rows.append(row | compared(pair, found, load_file(folder / f"{answer(pairs, pair)}.safetensors")))
        peers = json.loads((folder / "versions.json").read_text())
    here = environment() | {"date": datetime.date.today().isoformat()}
    setting = {"model": "SmolLM2-135M", "texts": args.texts, "tokens": args.tokens, "keep": args.keep, "steps": STEPS}
    return setting | {"environment": here, "peers": peers, "rows": rows}


def with_our_heads(pair: Pair, found: Found) -> Pair:
    """DuoAttention's press is told which share of the heads streams here: those that dropped keys."""
    if pair.job.get("press") != "DuoAttentionPress":
        return pair
    share = float((~found["kept"][0]).any(-1).double().mean())
    job = pair.job | {"options": pair.job["options"] | {"head_compression_ratio": share}}
    return replace(pair, job=job)


# --- the table ----------------------------------------------------------------------------------------------------

HEADS = ("ours", "peer", "scores: rank correlation", "kept keys in common", "heads with the same keys", "answers, nats")


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table."""
    common = told(row.get("shared"), "least")
    if "alike" in row:
        common = f"numbers alike: {told(row['alike'], 'least')}"
    same = f"{row['same']:.3f}" if "same" in row else "–"
    nats = f"{row['nats']['most']:.1e}" if "nats" in row else "–"
    return row["ours"], row["peer"], told(row.get("rank"), "least"), common, same, nats


def told(x: dict[str, float] | None, worst: str) -> str:
    """Mean, and the worst in brackets where it reads otherwise."""
    if x is None:
        return "–"
    mean, most = f"{x['mean']:.4f}", f"{x[worst]:.4f}"
    return mean if mean == most else f"{mean} ({most})"


def plain(data: dict[str, Any]) -> str:
    """The table for a terminal."""
    lines = [HEADS, *map(cells, data["rows"])]
    wide = [max(len(line[i]) for line in lines) for i in range(len(HEADS))]
    return "\n".join("  ".join(x.ljust(w) for x, w in zip(line, wide)).rstrip() for line in lines)


def markdown(data: dict[str, Any]) -> str:
    """The table for a page, where it was measured, and what explains the differences."""
    lines = [HEADS, ("---",) * len(HEADS), *(tuple(code(cells(row))) for row in data["rows"])]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    reasons = "\n".join(f"- `{row['ours']}` and {row['peer']}: {row['why']}" for row in data["rows"])
    missing = [f"`{name}`" for name in METHODS if name not in {row["method"] for row in data["rows"]}]
    left = f"\n\nNot measured yet: {', '.join(missing)}." if missing else ""
    return f"{table}\n\n{source(data)}\n\n{reasons}{left}"


def code(line: tuple[str, ...]) -> Iterator[str]:
    """The first cell as code."""
    yield f"`{line[0]}`"
    yield from line[1:]


def source(data: dict[str, Any]) -> str:
    """On what it was measured."""
    here = data["environment"]
    peers = ", ".join(f"{name} {number}" for name, number in data["peers"].items())
    ours = ", ".join(f"{name} {here[name]}" for name in ("saccade", "transformers", "torch"))
    return (
        f"{data['model']}, float32; prompts: {data['texts']}, of {data['tokens']} tokens, {data['keep']} kept, up to"
        f" {data['steps']} tokens after each. Ours: {ours}; theirs: {peers}. {here['cpu']}, {here['date']}."
    )


def filled(page: str, data: dict[str, Any]) -> str:
    """The page with its table made anew."""
    before, rest = page.split("<!-- table -->\n")
    _, after = rest.split("<!-- /table -->")
    return f"{before}<!-- table -->\n{markdown(data)}\n<!-- /table -->{after}"


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """What was stored, with the rows of the methods that were measured again in place of theirs."""
    if {name: x for name, x in old.items() if name != "rows"} != {name: x for name, x in new.items() if name != "rows"}:
        raise SystemExit("the file was measured otherwise, on another day or elsewhere: give another name")
    again = {row["method"] for row in new["rows"]}
    rows = [row for row in old["rows"] if row["method"] not in again] + new["rows"]
    return new | {"rows": sorted(rows, key=lambda row: list(METHODS).index(row["method"]))}


def read(path: Path) -> dict[str, Any]:
    """A stored result; of a folder the latest."""
    files = sorted(path.glob("agreement-*.json")) if path.is_dir() else [path]
    if not files:
        raise SystemExit(f"{path} holds no agreement-*.json; make one with --json")
    return max((json.loads(file.read_text("utf-8")) for file in files), key=lambda data: data["environment"]["date"])


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--tokens", type=int, default=512, help="of a prompt; a multiple of 32, for kivi's groups")
    parser.add_argument("--texts", type=int, default=2)
    parser.add_argument("--keep", type=float, default=0.25, help="share of the prompt that is kept")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--python", type=Path, default=HERE / ".venv" / "bin" / "python", help="of the peers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="store the result")
    parser.add_argument("--show", type=Path, metavar="PATH", help="measure nothing: print what is stored")
    parser.add_argument("--markdown", type=Path, metavar="PAGE", help="with --show: fill the table of a page")
    args = parser.parse_args(given)
    if args.markdown and not args.show:
        parser.error("--markdown needs --show")
    if not args.show and not args.python.is_file():
        parser.error(f"{args.python} is not there: make the peers' environment as the head of this file says")
    return args


def main() -> None:
    args = arguments()
    if args.show:
        data = read(args.show)
        if args.markdown:
            args.markdown.write_text(filled(args.markdown.read_text("utf-8"), data), "utf-8")
    else:
        torch.set_num_threads(args.threads)
        data = measure(args)
        if args.json and args.json.is_file():
            data = merged(json.loads(args.json.read_text("utf-8")), data)
        if args.json:
            args.json.write_text(json.dumps(data, indent=1) + "\n", "utf-8")
    print(plain(data))


if __name__ == "__main__":
    main()
