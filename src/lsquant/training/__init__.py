"""Training: parameter groups, schedules, distillation, averages of weights, checkpoints, the loop."""

from lsquant.training.batchnorm import reestimate_batchnorm as reestimate_batchnorm
from lsquant.training.distillation import classification_loss as classification_loss
from lsquant.training.distillation import distillation_loss as distillation_loss
from lsquant.training.ema import WeightAverage as WeightAverage
from lsquant.training.facts import clip_rates as clip_rates
from lsquant.training.facts import quantizer_facts as quantizer_facts
from lsquant.training.groups import param_groups as param_groups
from lsquant.training.log import Log as Log
from lsquant.training.loop import TrainProgress as TrainProgress
from lsquant.training.loop import fit as fit
from lsquant.training.oscillation import Oscillation as Oscillation
from lsquant.training.schedule import CosineSchedule as CosineSchedule
from lsquant.training.stages import widened as widened
from lsquant.training.state import load_state as load_state
from lsquant.training.state import save_state as save_state
from lsquant.training.transitions import TransitionRate as TransitionRate
