"""Fixtures of the tests of verdicts."""

from helpers.verify import exported as exported
from helpers.verify import trained as trained
