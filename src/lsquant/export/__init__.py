"""Writers of deployment formats, one file a format."""

from lsquant.export.onnx import export_onnx as export_onnx
from lsquant.export.onnx import onnx_session as onnx_session
from lsquant.export.packed import Packed as Packed
from lsquant.export.packed import PackedQuantizer as PackedQuantizer
from lsquant.export.packed import export_packed as export_packed
from lsquant.export.packed import load_packed as load_packed
from lsquant.export.packed import read_packed as read_packed
from lsquant.export.torchao import to_torchao as to_torchao
