"""Hypothesis: no deadline, since machines are shared; few examples, since each runs attention. One thread: the tensors
are tiny, and threads that wait for one another cost most of the time."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start, too

from hypothesis import settings

# in CI the same examples every time: a new one that fails is found by those who work on it, not by who comes last
settings.register_profile("saccade", deadline=None, max_examples=25, derandomize="CI" in os.environ)
settings.load_profile("saccade")
