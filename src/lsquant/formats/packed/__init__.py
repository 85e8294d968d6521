"""Packed files: the trained integers at their true size, in safetensors (docs/format.md states the format)."""

from lsquant.formats.packed.content import Packed as Packed
from lsquant.formats.packed.content import PackedQuantizer as PackedQuantizer
from lsquant.formats.packed.reader import read_packed as read_packed
from lsquant.formats.packed.writer import export_packed as export_packed
from lsquant.formats.packed.writer import load_packed as load_packed
