"""The reproducible tasks, and what trains and opens a run of one."""

from lsquant.runs.directory import Run as Run
from lsquant.runs.directory import is_run as is_run
from lsquant.runs.network_files import load_float as load_float
from lsquant.runs.settings import Settings as Settings
from lsquant.runs.task import Task as Task
from lsquant.runs.training import run_training as run_training
from lsquant.tasks.metrics import classification_metric as classification_metric
from lsquant.tasks.opening import open_run as open_run
from lsquant.tasks.opening import resume_training as resume_training
from lsquant.tasks.registry import TASKS as TASKS
from lsquant.tasks.registry import get_task as get_task
