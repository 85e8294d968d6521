"""The contract of a task, under the name by which task files import it; it is defined in `lsquant.runs`."""

from lsquant.runs.settings import Settings as Settings
from lsquant.runs.task import Split as Split
from lsquant.runs.task import Task as Task
