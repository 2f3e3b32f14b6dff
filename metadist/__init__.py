"""metadist: learning to learn across many tasks, from a laptop to a GPU cluster.

Imports torch alone; Ray, WebDataset and Weights & Biases are loaded when a run needs them.
"""

from metadist.episode import Episode, EpisodeBatch, Examples
from metadist.errors import MetadistError
from metadist.seeding import Rng
from metadist.tasks.base import TaskSource

__version__ = "0.1.0"
__all__ = ["Episode", "EpisodeBatch", "Examples", "MetadistError", "Rng", "TaskSource"]
