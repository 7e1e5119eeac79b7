# Depth: half the paper's, and nothing else changes.
base = "base.py"
n_layer = 8
