"""Networks for few-shot learning; any torch.nn.Module of your own serves as well."""

from metadist.models.backbone import Backbone
from metadist.models.conv4 import Conv4
from metadist.models.flatten import Flatten
from metadist.models.mann import MANN
from metadist.models.mlp import MLP
from metadist.models.rating import RatingModel
from metadist.models.resnet12 import ResNet12
from metadist.models.snail import SNAIL
from metadist.models.text import TextBag, TextConv, TextTransformer

__all__ = [
    "MANN", "MLP", "SNAIL", "Backbone", "Conv4", "Flatten", "RatingModel", "ResNet12",
    "TextBag", "TextConv", "TextTransformer",
]  # fmt: skip
