"""Runs: the run directory, its log and its training. A run knows no task; a task brings model, data and measure."""

from lsquant.runs.directory import Run as Run
from lsquant.runs.directory import StoredRun as StoredRun
from lsquant.runs.directory import is_run as is_run
from lsquant.runs.directory import read_run as read_run
from lsquant.runs.network_files import load_float as load_float
from lsquant.runs.settings import Settings as Settings
from lsquant.runs.task import Task as Task
from lsquant.runs.training import run_training as run_training
