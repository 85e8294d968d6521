"""Compares what was exported with what was trained: one loop, one file a runtime, and the verdict."""

from lsquant.verification.comparison import verify as verify
from lsquant.verification.profiles import Comparison as Comparison
from lsquant.verification.profiles import compare as compare
from lsquant.verification.runtimes import RUNTIMES as RUNTIMES
from lsquant.verification.vectors import export_vectors as export_vectors
from lsquant.verification.verdict import LEVELS as LEVELS
from lsquant.verification.verdict import Check as Check
from lsquant.verification.verdict import Verdict as Verdict
