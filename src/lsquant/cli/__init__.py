"""The command line: each command parses its arguments and calls the library."""

from lsquant.cli.main import main as main
