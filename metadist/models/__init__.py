"""Networks for few-shot learning; any torch.nn.Module of your own serves as well."""

from metadist.models.conv4 import Conv4
from metadist.models.flatten import Flatten
from metadist.models.mlp import MLP

__all__ = ["MLP", "Conv4", "Flatten"]
