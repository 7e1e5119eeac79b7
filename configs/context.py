# Implicit sparsity, attention: depth.py with four times the context and the same number of tokens
# per step. (paper: T = 256 to 8192)
base = "depth.py"
block_size = 512
