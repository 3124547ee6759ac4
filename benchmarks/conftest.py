"""The settings and fixtures of tests/conftest.py, for the tests of benchmarks."""

from conftest import programs_of_one_file, selecting_pays, state_of_the_user

__all__ = ["programs_of_one_file", "selecting_pays", "state_of_the_user"]
