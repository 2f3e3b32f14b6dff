"""The outer loop's arithmetic: an ordered sum of meta-gradients, and the update they make."""

from metadist.outer.gradient import Block, Layout, TreeSum, sha256_of
from metadist.outer.update import MetaUpdate

__all__ = ["Block", "Layout", "MetaUpdate", "TreeSum", "sha256_of"]
