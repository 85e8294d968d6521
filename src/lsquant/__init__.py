"""Learned Step Size Quantization: quantization scales trained with the weights, shipped as the integers trained."""

import lsquant._util.interrupt as _interrupt  # noqa: F401  (before PyTorch)
from lsquant import nn as nn
from lsquant import reference as reference
from lsquant._util.errors import LsquantError as LsquantError
from lsquant._util.errors import UsageError as UsageError
from lsquant._version import __version__ as __version__
from lsquant.bias_correction import correct_bias as correct_bias
from lsquant.calibration import calibrate as calibrate
from lsquant.changes import Changes as Changes
from lsquant.checkpoint import load as load
from lsquant.checkpoint import save as save
from lsquant.convert import disabled as disabled
from lsquant.convert import prepare as prepare
from lsquant.convert import resolved_recipe as resolved_recipe
from lsquant.convert import revert as revert
from lsquant.diagnostics import Finding as Finding
from lsquant.diagnostics import Sensitivity as Sensitivity
from lsquant.diagnostics import check as check
from lsquant.diagnostics import sensitivity as sensitivity
from lsquant.formats import Packed as Packed
from lsquant.formats import PackedQuantizer as PackedQuantizer
from lsquant.formats import export_compressed_tensors as export_compressed_tensors
from lsquant.formats import export_gguf as export_gguf
from lsquant.formats import export_hf as export_hf
from lsquant.formats import export_onnx as export_onnx
from lsquant.formats import export_packed as export_packed
from lsquant.formats import export_program as export_program
from lsquant.formats import load_packed as load_packed
from lsquant.formats import onnx_session as onnx_session
from lsquant.formats import read_packed as read_packed
from lsquant.formats import to_torchao as to_torchao
from lsquant.fusion import FusedNetwork as FusedNetwork
from lsquant.fusion import fuse as fuse
from lsquant.kernels import use_engine as use_engine
from lsquant.nn import integer_weights as integer_weights
from lsquant.nn import quantizers as quantizers
from lsquant.ops import fake_quantize as fake_quantize
from lsquant.quantizer import Quantizer as Quantizer
from lsquant.recipe import Recipe as Recipe
from lsquant.recipe import Rule as Rule
from lsquant.report.page import write_report as write_report
from lsquant.shipped import to_integer as to_integer
from lsquant.spec import QuantSpec as QuantSpec
from lsquant.tracing import Traced as Traced
from lsquant.tracing import trace as trace
from lsquant.training import param_groups as param_groups
from lsquant.verification import Comparison as Comparison
from lsquant.verification import Verdict as Verdict
from lsquant.verification import compare as compare
from lsquant.verification import export_vectors as export_vectors
from lsquant.verification import verify as verify

__all__ = [
    "Changes",
    "Comparison",
    "Finding",
    "FusedNetwork",
    "LsquantError",
    "Packed",
    "PackedQuantizer",
    "QuantSpec",
    "Quantizer",
    "Recipe",
    "Rule",
    "Sensitivity",
    "Traced",
    "UsageError",
    "Verdict",
    "__version__",
    "calibrate",
    "check",
    "compare",
    "correct_bias",
    "disabled",
    "export_compressed_tensors",
    "export_gguf",
    "export_hf",
    "export_onnx",
    "export_packed",
    "export_program",
    "export_vectors",
    "fake_quantize",
    "fuse",
    "integer_weights",
    "load",
    "load_packed",
    "nn",
    "onnx_session",
    "param_groups",
    "prepare",
    "quantizers",
    "read_packed",
    "reference",
    "resolved_recipe",
    "revert",
    "save",
    "sensitivity",
    "to_integer",
    "to_torchao",
    "trace",
    "use_engine",
    "verify",
    "write_report",
]
