# Depth: L = 16 stands for the paper's 32.
base = "depth_16.py"
n_layer = 16
