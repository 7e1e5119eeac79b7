base = "depth_16.py"
n_layer = 6
