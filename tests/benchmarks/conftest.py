"""Fixtures of the tests of benchmarks/ and studies/."""

from helpers.benchmarks import bench as bench
from helpers.long_runs import words as words
