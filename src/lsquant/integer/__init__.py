"""The integer model: codes, steps and the float leftovers of a trained model, with the trained model's outputs."""

from lsquant.integer.layers import FrozenQuantizer as FrozenQuantizer
from lsquant.integer.layers import IntegerConv as IntegerConv
from lsquant.integer.layers import IntegerLayer as IntegerLayer
from lsquant.integer.layers import IntegerLinear as IntegerLinear
from lsquant.integer.model import integer_model as integer_model
