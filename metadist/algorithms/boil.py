"""Body only update in the inner loop."""

from __future__ import annotations

from metadist.algorithms.anil import HeadAndBody


class BOIL(HeadAndBody):
    """MAML whose inner loop changes everything but the last layer (Oh et al. 2021, section 3).

    The last layer is learned by the outer loop alone, so that adaptation has to move the features.
    """

    def adapts(self, name: str) -> bool:
        return name not in self.model.head_params
