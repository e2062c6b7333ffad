"""Hypothesis: no deadline, since machines are shared; few examples, since each runs attention. One thread: the tensors
are tiny, and threads that wait for one another cost most of the time."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start, too

from hypothesis import settings

# the same examples every time: one that fails is found by those who look for it, with --hypothesis-profile=search
settings.register_profile("saccade", deadline=None, max_examples=25, derandomize=True)
settings.register_profile("search", settings.get_profile("saccade"), max_examples=150, derandomize=False)
settings.load_profile("saccade")
