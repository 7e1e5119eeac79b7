# Depth scaling: L = 24.
base = "depth_16.py"
n_layer = 24
batch_size = 4
