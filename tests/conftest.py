"""Hypothesis for all tests: no deadline, since the cores are shared and first calls are slow."""

from hypothesis import settings

settings.register_profile("nmoe", deadline=None)
settings.load_profile("nmoe")
