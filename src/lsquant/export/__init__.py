"""Writers of deployment formats, one file a format."""

from lsquant.export.onnx import export_onnx as export_onnx
from lsquant.export.onnx import onnx_session as onnx_session
