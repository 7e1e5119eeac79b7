# Depth: L = 6 stands for the paper's 12.
base = "depth_16.py"
n_layer = 6
