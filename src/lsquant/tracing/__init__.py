"""Functions in a model's forward become modules, so that recipes can name them (docs/tracing.md)."""

from lsquant.tracing.entry import trace as trace
from lsquant.tracing.result import Traced as Traced
from lsquant.tracing.result import TracedBlock as TracedBlock
