"""Facts about the quantizers of a model, as plain dataclasses."""

from lsquant.diagnostics.collect import QuantizerFacts as QuantizerFacts
from lsquant.diagnostics.collect import collect as collect
