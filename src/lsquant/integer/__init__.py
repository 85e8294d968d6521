"""The integer model: codes, steps and the float leftovers of a trained model, with the trained model's outputs."""

from lsquant.integer.layers import FrozenQuantizer as FrozenQuantizer
from lsquant.integer.layers import IntegerConv as IntegerConv
from lsquant.integer.layers import IntegerEmbedding as IntegerEmbedding
from lsquant.integer.layers import IntegerLayer as IntegerLayer
from lsquant.integer.layers import IntegerLinear as IntegerLinear
from lsquant.integer.model import frozen_parts as frozen_parts
from lsquant.integer.model import integer_model as integer_model
from lsquant.integer.model import to_integer as to_integer
