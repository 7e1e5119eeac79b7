# Depth: dense.py with twice the layers. Is the second half of them useful? (paper: depth 12 to 32)
base = "dense.py"
n_layer = 16
