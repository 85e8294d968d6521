"""What ships of a trained model: the record of its codes and steps, and the integer model made from it."""

from lsquant.shipped.copying import copied as copied
from lsquant.shipped.copying import drop_observers as drop_observers
from lsquant.shipped.frozen import FrozenQuantizer as FrozenQuantizer
from lsquant.shipped.integer_layers import IntegerConv as IntegerConv
from lsquant.shipped.integer_layers import IntegerEmbedding as IntegerEmbedding
from lsquant.shipped.integer_layers import IntegerLayer as IntegerLayer
from lsquant.shipped.integer_layers import IntegerLinear as IntegerLinear
from lsquant.shipped.integer_model import frozen_parts as frozen_parts
from lsquant.shipped.integer_model import integer_model as integer_model
from lsquant.shipped.integer_model import to_integer as to_integer
from lsquant.shipped.leftovers import leftovers as leftovers
from lsquant.shipped.pairs import Pair as Pair
from lsquant.shipped.pairs import Stored as Stored
from lsquant.shipped.pairs import paired as paired
from lsquant.shipped.record import Shipped as Shipped
from lsquant.shipped.record import ShippedLayer as ShippedLayer
from lsquant.shipped.record import ShippedQuantizer as ShippedQuantizer
from lsquant.shipped.record import ShippedWeight as ShippedWeight
from lsquant.shipped.record import require_all_shippable as require_all_shippable
from lsquant.shipped.record import ship as ship
