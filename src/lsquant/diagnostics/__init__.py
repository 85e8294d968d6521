"""Facts about the quantizers of a model, as plain dataclasses; what is wrong with it; what costs most."""

from lsquant.diagnostics.checks import Finding as Finding
from lsquant.diagnostics.checks import check as check
from lsquant.diagnostics.collect import QuantizerFacts as QuantizerFacts
from lsquant.diagnostics.collect import balance as balance
from lsquant.diagnostics.collect import collect as collect
from lsquant.diagnostics.ranking import Sensitivity as Sensitivity
from lsquant.diagnostics.ranking import sensitivity as sensitivity
