base = "depth_16.py"
n_layer = 24
batch_size = 4
