"""The reproducible jobs, and the run directories they leave."""

from lsquant.tasks.directory import Run as Run
from lsquant.tasks.directory import is_run as is_run
from lsquant.tasks.directory import open_run as open_run
from lsquant.tasks.metrics import classification_metric as classification_metric
from lsquant.tasks.protocol import Settings as Settings
from lsquant.tasks.protocol import Task as Task
from lsquant.tasks.registry import TASKS as TASKS
from lsquant.tasks.registry import get_task as get_task
from lsquant.tasks.run import load_float as load_float
from lsquant.tasks.run import resume_training as resume_training
from lsquant.tasks.run import run_training as run_training
