# Depth: L = 8 stands for the paper's 16. The other depths are halved, too; nothing else changes.
base = "base.py"
n_layer = 8
