# Implicit sparsity, attention: four times the context of depth.py at the same tokens per step. (paper: T = 256 to 8192)
base = "depth.py"
block_size = 512
