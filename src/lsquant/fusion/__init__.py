"""``fuse``: a trained network in its folded, integer-only form."""

from lsquant.fusion.changes import FoldChanges as FoldChanges
from lsquant.fusion.network import FusedNetwork as FusedNetwork
from lsquant.fusion.network import Tap as Tap
from lsquant.fusion.network import fuse as fuse
