# Depth: L = 8 stands for the paper's 16, half of it as in the others; nothing else changes.
base = "base.py"
n_layer = 8
