"""ONNX files whose integers are the trained ones, in three profiles, and the session that runs them as intended."""

from lsquant.formats.onnx.reader import load_onnx as load_onnx
from lsquant.formats.onnx.reader import onnx_session as onnx_session
from lsquant.formats.onnx.writer import export_onnx as export_onnx
from lsquant.formats.onnx.writer import onnx_model as onnx_model
