"""Model folders of transformers: codes for vLLM and transformers, or float weights (docs/compressed-tensors.md)."""

from lsquant.formats.folders.writer import export_compressed_tensors as export_compressed_tensors
from lsquant.formats.folders.writer import export_hf as export_hf
