"""attend over a neighbourhood on a grid by Triton against float64: in Triton's interpreter, and on a CUDA device."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from saccade import ops
from saccade.core.errors import CannotRun
from saccade.core.selection import PerHead, Spans
from saccade.ops.attend.triton import grid as boxes
from tests.ops._triton import interpreter, run_in_interpreter
from tests.ops.shapes import HEAD_SIZES, tensors
from tests.ops.test_attend_triton import DTYPES, EXACT, _within_the_tensors, check, moved  # noqa: F401  (a fixture)

SIDES = {1: (20, 40), 2: (5, 8), 3: (3, 4)}  # of a drawn grid, by its axes
SHAPES = {  # sides that are no whole boxes
    "line": ((501,), (90,), 1),
    "dilated line": ((501,), (40,), 3),
    "plane": ((21, 27), (9, 10), 1),
    "dilated plane": ((21, 27), (5, 6), 2),
    "flat plane": ((3, 200), (3, 51), 1),
    "space": ((5, 9, 13), (3, 4, 7), 1),
    "dilated space": ((5, 9, 13), (2, 3, 4), 2),
    "all of it": ((21, 27), (21, 27), 1),
}


def neighbourhood(grid, kernel, dilation=1, causal=False) -> Spans:
    one = torch.ones(1, dtype=torch.long)
    n = math.prod(grid)
    return Spans(
        sinks=one, window=one, grid=grid, kernel=kernel, dilation=dilation, causal=causal, queries=n, keys=n
    )


def test_in_the_interpreter():
    run_in_interpreter(__file__)


@st.composite
def cases(draw):
    axes = draw(st.integers(1, 3))
    grid = tuple(draw(st.integers(*SIDES[axes])) for _ in range(axes))
    kernel = tuple(draw(st.integers(2, n + 1)) for n in grid)
    dilation = draw(st.integers(1, min(3, min(grid) // 2)))  # two cells or more of each remainder
    return neighbourhood(grid, kernel, dilation, draw(st.booleans()))


quick = settings(
    max_examples=5,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@interpreter
@quick
@given(cases(), st.sampled_from(EXACT), st.sampled_from([None, 5.0]))
def test_values_and_gradients(selection, dtype, softcap):
    if selection.causal and dtype == torch.float32:  # refused where it counts; of rows of few keys up to 2.1 times
        dtype = torch.float16
    check(selection, tensors(1, 1, 1, selection.queries, selection.keys, 16, dtype), softcap=softcap)


@interpreter
@pytest.mark.parametrize("grid, kernel", [((1,), (1,)), ((3, 1), (1, 1)), ((1, 2, 5), (1, 1, 2))])
def test_small_grids_and_windows_of_one(grid, kernel):
    """In float16: where a row sees one key, its gradient is a difference of equal numbers, and PyTorch's is exact."""
    selection = neighbourhood(grid, kernel)
    check(selection, tensors(1, 1, 1, selection.queries, selection.keys, 16, torch.float16))


@interpreter
@pytest.mark.parametrize("grid, kernel", [((9, 13), (7, 13)), ((5, 4, 5), (4, 4, 5)), ((72,), (70,))])
def test_whole_boxes_come_without_a_mask(grid, kernel):
    """Windows that hold whole boxes, beside others: every part of the walk."""
    selection = neighbourhood(grid, kernel)
    check(selection, tensors(1, 1, 1, selection.queries, selection.keys, 16, torch.float32))


@interpreter
def test_sequences_grouped_heads_strides_and_values_of_another_size():
    selection = neighbourhood((4, 5), (3, 4))
    q, k, _ = tensors(2, 4, 2, 20, 20, 20)
    v = tensors(2, 4, 2, 20, 20, 32)[2]
    check(selection, [q, k, v], layout=lambda x: x.transpose(1, 2).contiguous().transpose(1, 2))


# --- on any machine -------------------------------------------------------------------------------------------------


@given(cases(), st.sampled_from([16, 32, 64, 128]))
def test_a_box_has_its_cells_and_boxes_hold_the_grid(selection, cells):
    found = boxes.of(selection)
    box = found.box(cells)
    assert math.prod(box) == cells and all(n & (n - 1) == 0 for n in box)
    assert found.tokens == selection.keys <= found.tiles(box) * cells
    assert found.size[: boxes.AXES - found.axes] == (1,) * (boxes.AXES - found.axes)


@given(cases())
def test_the_rule_along_an_axis_is_the_selections(selection):
    """first(c) and its reverse, as they stand in the text, by remainder."""
    found = boxes.of(selection)
    near = torch.ones((), dtype=torch.bool)
    for n, w, gap in zip(found.size, found.wide, found.gap):
        axis = torch.zeros(n, n, dtype=torch.bool)
        for q, k in itertools.product(range(n), repeat=2):
            m, c, j = (n - q % gap + gap - 1) // gap, q // gap, k // gap
            first = min(max(c - w // 2, 0), max(m - w, 0))
            forward = first <= j < first + w
            back = (0 if j < w else j - w + 1 + w // 2) <= c <= (m - 1 if j >= m - w else j + w // 2)
            if q % gap == k % gap:
                assert forward == back
                axis[q, k] = forward
        near = torch.kron(near.int(), axis.int()).bool() if near.dim() else axis
    if selection.causal:
        near = near.tril()
    assert torch.equal(near, selection.mask()[0, 0])


REASONS = {
    "a grid of 4 axes; it takes up to 3": neighbourhood((2, 2, 2, 1), (1, 1, 1, 1)),
    "a neighbourhood of (3,) on a grid of (2, 4); it takes 1 or more along each axis": neighbourhood((2, 4), (3,)),
    "a neighbourhood of (0, 3) on a grid of (2, 4)": neighbourhood((2, 4), (0, 3)),
    "the selection is a neighbourhood on a grid": PerHead(
        parts=((torch.arange(4), neighbourhood((2, 4), (1, 3))),), queries=8, keys=8, causal=False
    ),
}


@pytest.mark.parametrize("text", REASONS)
def test_it_says_why_it_cannot(text):
    q, k, v = tensors(1, 4, 2, 8, 8, 32)
    with pytest.raises(CannotRun) as caught:
        ops.attend(q, k, v, REASONS[text], impl="triton")
    assert text in str(caught.value)


# --- on a CUDA device -----------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_shapes_on_a_gpu(name, dtype):
    selection = neighbourhood(*SHAPES[name])
    check(selection, tensors(2, 4, 2, selection.queries, selection.keys, 64, dtype), device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("size", HEAD_SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_head_sizes_on_a_gpu(size, dtype):
    selection = neighbourhood(*SHAPES["plane"])
    inputs = tensors(1, 4, 2, selection.queries, selection.keys, size, dtype)
    if dtype == torch.float32 and size > 128:
        with pytest.raises(CannotRun, match="gradients in float32"):
            check(selection, inputs, device="cuda")
    else:
        check(selection, inputs, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ("dilated line", "plane", "space"))
@pytest.mark.parametrize("causal, softcap", [(True, None), (False, 5.0)])
def test_causality_and_softcap_on_a_gpu(name, causal, softcap):
    selection = neighbourhood(*SHAPES[name], causal=causal)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = tensors(1, 4, 2, selection.queries, selection.keys, 128, dtype)
        if causal and dtype == torch.float32:
            with pytest.raises(CannotRun, match="a causal grid in float32"):
                check(selection, inputs, softcap=softcap, device="cuda")
        else:
            check(selection, inputs, softcap=softcap, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ("dilated plane", "space"))
def test_poisoned_memory_and_strided_inputs_on_a_gpu(name):
    selection = neighbourhood(*SHAPES[name])
    inputs = tensors(2, 4, 2, selection.queries, selection.keys, 128, torch.bfloat16)
    for layout in (lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), lambda x: torch.stack([x, x], -1)[..., 0]):
        poison = [torch.full((1 << 22,), torch.nan, device="cuda") for _ in range(20)]
        del poison  # its memory is given out again
        check(selection, inputs, device="cuda", layout=layout)


@pytest.mark.gpu
def test_it_is_what_auto_takes_on_a_gpu():
    said = []
    q, k, v = (x.cuda() for x in tensors(1, 4, 2, 64, 64, 64, torch.bfloat16))
    ops.attend(q, k, v, moved(neighbourhood((8, 8), (3, 3)), "cuda"), report=said.append)
    assert said == ["attend:triton"]
