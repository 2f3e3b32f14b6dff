"""What a run has learned, over HTTP: adapt to a few examples, ask about others. Needs ``metadist[serve]``."""
