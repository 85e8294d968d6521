"""Engines: nothing but arithmetic.  ``engine.py`` is their contract, ``choice.py`` the table and the choice."""

from lsquant.kernels.choice import ENGINES as ENGINES
from lsquant.kernels.choice import PREFERRED as PREFERRED
from lsquant.kernels.choice import VARIABLE as VARIABLE
from lsquant.kernels.choice import engine_for as engine_for
from lsquant.kernels.choice import use_engine as use_engine
from lsquant.kernels.choice import visible as visible
from lsquant.kernels.choice import why_not as why_not
from lsquant.kernels.engine import Conv as Conv
from lsquant.kernels.engine import Engine as Engine
from lsquant.kernels.engine import Grid as Grid
from lsquant.kernels.engine import swap_channels as swap_channels
