# Depth scaling: L = 12.
base = "depth_16.py"
n_layer = 12
