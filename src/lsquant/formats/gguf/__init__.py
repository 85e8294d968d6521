"""GGUF files of language models, the format of llama.cpp (docs/gguf.md states what is written)."""

from lsquant.formats.gguf.container import GgufFile as GgufFile
from lsquant.formats.gguf.container import GgufTensor as GgufTensor
from lsquant.formats.gguf.container import read_gguf as read_gguf
from lsquant.formats.gguf.vocabulary import Vocabulary as Vocabulary
from lsquant.formats.gguf.writer import export_gguf as export_gguf
