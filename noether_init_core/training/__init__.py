"""TrainerState: the state of a plain PyTorch training loop besides model and optimizer.

``state`` has the class itself, ``loader`` the order and position of the data, ``randomness`` the random generators,
``plain_state`` the conversion to plain data for a checkpoint. Nothing here reads or writes files.
"""

from __future__ import annotations

from noether_init_core.training.loader import TrainingLoader
from noether_init_core.training.state import TrainerState

__all__ = ["TrainerState", "TrainingLoader"]
