# Implicit sparsity, attention: T = 128 stands for the paper's 2048; 16 to 512 for its 256 to 8192.
# The same tokens per step whatever it is.
base = "base.py"
block_size = 128
