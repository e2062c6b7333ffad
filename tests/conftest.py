"""Hypothesis: no deadline, since machines are shared; few examples, since each runs attention."""

from hypothesis import settings

settings.register_profile("saccade", deadline=None, max_examples=40)
settings.load_profile("saccade")
