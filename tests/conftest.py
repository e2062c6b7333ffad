"""Hypothesis: no deadline, since machines are shared; few examples, since each runs attention. One thread: the tensors
are tiny, and threads that wait for one another cost most of the time."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start, too

from hypothesis import settings

settings.register_profile("saccade", deadline=None, max_examples=25)
settings.load_profile("saccade")
