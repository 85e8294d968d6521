"""Fixtures of the tests of the command line."""

from helpers.cli_own import calibrated as calibrated
from helpers.cli_own import own as own
from helpers.command_line import line as line
