"""Hypothesis as these tests use it: the same examples every time, and no deadline on a busy machine."""

from hypothesis import settings

settings.register_profile("maths", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("maths")
