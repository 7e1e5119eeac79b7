# Depth: twice the layers of dense.py and nothing else. Does the second half earn its keep? (paper: depth 12 to 32)
base = "dense.py"
n_layer = 16
