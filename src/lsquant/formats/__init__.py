"""Formats that a trained model ships in."""

from lsquant.formats.base import FileFormat as FileFormat
from lsquant.formats.base import Format as Format
from lsquant.formats.base import ModuleFormat as ModuleFormat
from lsquant.formats.folders import export_compressed_tensors as export_compressed_tensors
from lsquant.formats.folders import export_hf as export_hf
from lsquant.formats.gguf import export_gguf as export_gguf
from lsquant.formats.onnx import export_onnx as export_onnx
from lsquant.formats.onnx import onnx_session as onnx_session
from lsquant.formats.packed import Packed as Packed
from lsquant.formats.packed import PackedQuantizer as PackedQuantizer
from lsquant.formats.packed import export_packed as export_packed
from lsquant.formats.packed import load_packed as load_packed
from lsquant.formats.packed import read_packed as read_packed
from lsquant.formats.program import export_program as export_program
from lsquant.formats.table import DEFAULT as DEFAULT
from lsquant.formats.table import FORMATS as FORMATS
from lsquant.formats.table import INTEGER_ONLY as INTEGER_ONLY
from lsquant.formats.table import file_format as file_format
from lsquant.formats.table import file_formats as file_formats
from lsquant.formats.table import format_of as format_of
from lsquant.formats.table import profile_of as profile_of
from lsquant.formats.torchao import to_torchao as to_torchao
