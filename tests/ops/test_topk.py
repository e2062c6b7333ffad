"""topk: the places that a stable sort gives, in ascending order; by Triton in its interpreter and on a CUDA device."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade import ops
from saccade.core import rng
from saccade.core.errors import BadInput, CannotRun
from tests.ops._triton import interpreter, run_in_interpreter

SPECIAL = (0.0, -0.0, 1.0, -1.0, float("inf"), -float("inf"), float("nan"), 3.4e38, -3.4e38, 1e-45)


def test_in_the_interpreter():
    run_in_interpreter(__file__)


def scores(rows: int, n: int, kind: str, seed: int = 0) -> torch.Tensor:
    """Normals; few values, so that many are equal; the oddest floats there are; or as said below."""
    x = torch.randn(rows, n, generator=rng.generator("topk", seed, rows, n))
    if kind == "equal":
        return (2 * x).round()
    if kind == "special":
        place = torch.randint(0, len(SPECIAL), (rows, n), generator=rng.generator("special", seed, rows, n))
        return torch.tensor(SPECIAL)[place]
    if kind == "few":  # but few that are there, and a cluster of large ones
        x = x.masked_fill(torch.arange(n) % 7 > 0, -torch.inf)
        x[:, n // 3 : n // 3 + 40] += 9
    if kind == "alike":  # most are the same
        x = x.clamp(min=1.5)
    return x


def sorted_out(x: torch.Tensor, keep: int) -> torch.Tensor:
    """By Python, row by row."""
    out = torch.full((len(x), min(keep, x.shape[1])), -1, dtype=torch.int32)
    for row, values in enumerate(x.tolist()):
        order = sorted(
            range(len(values)), key=lambda i: (values[i] == values[i], -values[i] if values[i] == values[i] else 0)
        )
        chosen = sorted(i for i in order[:keep] if values[i] != -float("inf"))
        out[row, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
    return out


@given(st.integers(1, 40), st.integers(1, 50), st.sampled_from(["normal", "equal", "special"]), st.integers(0, 9))
def test_the_oracle_is_a_sort(n, keep, kind, seed):
    x = scores(3, n, kind, seed)
    assert torch.equal(ops.topk(x, keep, impl="reference"), sorted_out(x, keep))
    values = x.gather(-1, ops.topk(x, keep, impl="torch").clamp(min=0).long())
    expected = x.gather(-1, sorted_out(x, keep).clamp(min=0).long())
    assert torch.equal(values.sort(-1).values.nan_to_num(5.0), expected.sort(-1).values.nan_to_num(5.0))


@interpreter
@settings(max_examples=12)
@given(st.integers(1, 300), st.integers(1, 50), st.sampled_from(["normal", "equal", "special"]), st.integers(0, 9))
def test_the_kernel_is_the_oracle(n, keep, kind, seed):
    x = scores(2, n, kind, seed)
    said = []
    expected = ops.topk(x, keep, impl="reference")
    assert torch.equal(ops.topk(x, keep, impl="triton", report=said.append), expected)
    assert said == ["topk:triton"]


@interpreter
def test_other_dtypes_shapes_and_strides():
    x = scores(6, 90, "normal").view(2, 3, 90)
    for kind in (torch.bfloat16, torch.float16):
        assert torch.equal(ops.topk(x.to(kind), 7, impl="triton"), ops.topk(x.to(kind), 7, impl="reference"))
    turned = x.transpose(0, 1)[..., ::2]
    assert torch.equal(ops.topk(turned, 7, impl="triton"), ops.topk(turned, 7, impl="reference"))
    with pytest.raises(CannotRun, match="the scores are float64"):
        ops.topk(x.double(), 3, impl="triton")


@interpreter
@settings(max_examples=10)
@given(
    st.integers(1, 700), st.integers(1, 60), st.sampled_from(["normal", "equal", "special", "few", "alike"]),
    st.sampled_from([(16, 64), (64, 64), (256, 128)]), st.integers(0, 9),
)  # fmt: skip
def test_rows_shared_by_programs_are_the_oracle_whatever_the_sample_says(n, keep, kind, sizes, seed):
    from saccade.ops.topk import long

    x, keep = scores(2, n, kind, seed), min(keep, n)
    how = long.Plan(*sizes, part=128, step=32, part_warps=4, sample_warps=4, tile_warps=4)
    assert torch.equal(long.topk(x, keep, how), ops.topk(x, keep, impl="reference"))


@interpreter
def test_long_rows():
    said = []
    for kind, dtype, keep in (("normal", torch.float32, 700), ("few", torch.bfloat16, 3000)):
        x = scores(2, 20001, kind).to(dtype)
        found = ops.topk(x.unflatten(0, (1, 2)), keep, impl="triton", report=said.append)
        assert torch.equal(found[0], ops.topk(x, keep, impl="reference"))
    assert said == ["topk:triton"] * 2


@interpreter
def test_what_long_rows_cannot_have():
    with pytest.raises(CannotRun, match="keeps up to 12288 of rows longer than 16384, and these have 20000"):
        ops.topk(torch.zeros(20000), 12289, impl="triton")
    with pytest.raises(CannotRun, match="takes up to 2048 of rows longer than 16384, and these have 16385"):
        ops.topk(torch.zeros(()).expand(2049, 16385), 3, impl="triton")
    q, k, bounds = torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 20000, 8), torch.zeros(1, 1, 20000, 8)
    with pytest.raises(CannotRun, match="keeps up to 12288 of rows longer than 16384, and these have 20000"):
        ops.sparse_step(q, k, k, bounds, bounds, page_tokens=1, keep_pages=12289, impl="triton")


def test_nothing_to_choose_is_refused():
    with pytest.raises(BadInput, match="keeps one or more"):
        ops.topk(torch.zeros(3, 4), 0)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["normal", "equal", "special"])
@pytest.mark.parametrize("n", [1, 100, 1024, 8192, 16384])
def test_places_on_a_gpu(n, kind):
    x = scores(5, n, kind).cuda()
    for keep in (1, 64, 2048):
        said = []
        assert torch.equal(ops.topk(x, keep, report=said.append), ops.topk(x, keep, impl="reference"))
        assert said == ["topk:triton"]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["normal", "equal", "special", "few", "alike"])
@pytest.mark.parametrize(
    "rows, n, keeps, dtype",
    [
        (3, 16385, (1, 4096), torch.float32),
        (64, 131072, (512, 4096, 8192, 12288), torch.float32),
        (8, 524288, (4096,), torch.float32),
        (8, 200003, (4096,), torch.bfloat16),
        (600, 40000, (1000,), torch.float16),
    ],
)
def test_places_in_long_rows_on_a_gpu(rows, n, keeps, dtype, kind):
    x = scores(rows, n, kind).cuda().to(dtype)
    for keep in keeps:
        said = []
        found, expected = ops.topk(x, keep, report=said.append), ops.topk(x, keep, impl="reference")
        assert said == ["topk:triton"] and torch.equal(found, expected)


@pytest.mark.gpu
def test_long_rows_in_a_cuda_graph():
    x = scores(64, 131072, "normal").cuda()
    ops.topk(x, 4096)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = ops.topk(x, 4096)
    for kind in ("normal", "equal", "few", "alike", "normal"):
        for seed in range(3):
            x.copy_(scores(64, 131072, kind, seed))
            graph.replay()
            assert torch.equal(found, ops.topk(x, 4096, impl="reference"))
