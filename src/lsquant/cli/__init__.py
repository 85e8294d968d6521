"""The command line: each command parses and calls the library."""

from lsquant.cli.main import main as main
