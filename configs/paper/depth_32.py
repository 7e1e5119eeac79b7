# Depth scaling: L = 32.
base = "depth_16.py"
n_layer = 32
batch_size = 4
