# Depth: L = 12 stands for the paper's 24.
base = "depth_16.py"
n_layer = 12
