# Implicit sparsity, attention: depth.py with four times the context, at the same tokens per step. (paper: T = 256 to
# 8192)
base = "depth.py"
block_size = 512
