"""The runtimes that ``verify`` runs files in, one a file."""

from lsquant.verification.runtimes.numpy import NumpyRuntime
from lsquant.verification.runtimes.onnxruntime import OrtRuntime
from lsquant.verification.runtimes.openvino import OpenVinoRuntime
from lsquant.verification.runtimes.protocol import Observed as Observed
from lsquant.verification.runtimes.protocol import Opened as Opened
from lsquant.verification.runtimes.protocol import Runner as Runner
from lsquant.verification.runtimes.protocol import Runtime as Runtime
from lsquant.verification.runtimes.pytorch import PyTorchRuntime
from lsquant.verification.runtimes.web import WebRuntime

RUNTIMES: dict[str, Runtime] = {
    runtime.name: runtime
    for runtime in (OrtRuntime(), OpenVinoRuntime(), WebRuntime(), PyTorchRuntime(), NumpyRuntime())
}
"""Name -> runtime.  A format's row says which of them run its files."""
