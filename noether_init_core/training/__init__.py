"""TrainerState for plain PyTorch loops; here lives what a training loop keeps besides model and optimizer.

``state`` is the whole, ``loader`` the order and position of the data, ``randomness`` the generators, ``plain_state``
the conversion to what a checkpoint file may hold. Nothing here reads or writes files.
"""

from __future__ import annotations

from noether_init_core.training.loader import TrainingLoader
from noether_init_core.training.state import TrainerState

__all__ = ["TrainerState", "TrainingLoader"]
