"""Callbacks and optimizers for training frameworks. Each module imports its framework; import the one you use:

from lsquant.integrations import huggingface      # Trainer
from lsquant.integrations import lightning
from lsquant.integrations import distributed      # torch's DistributedDataParallel; needs torch only
"""
