"""Facts about the quantizers of a model, as plain dataclasses; problems of it; the cost of each quantizer."""

from lsquant.diagnostics.checks import check as check
from lsquant.diagnostics.collect import QuantizerFacts as QuantizerFacts
from lsquant.diagnostics.collect import balance as balance
from lsquant.diagnostics.collect import collect as collect
from lsquant.diagnostics.findings import Finding as Finding
from lsquant.diagnostics.ranking import Sensitivity as Sensitivity
from lsquant.diagnostics.ranking import sensitivity as sensitivity
