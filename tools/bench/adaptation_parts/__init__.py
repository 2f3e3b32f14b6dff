"""The parts of ``tools/bench/adaptation.py``: what is computed, by whom, how it is measured and how it is told."""
