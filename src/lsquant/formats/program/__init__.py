"""Programs: integer-only networks as JSON and tensors, for readers without a runtime."""

from lsquant.formats.program.writer import export_program as export_program
