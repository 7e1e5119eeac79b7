# Implicit sparsity, attention: T = 128 stands for the paper's 2048, and T = 16 to 512 for its 256
# to 8192. The number of tokens per step does not depend on T.
base = "base.py"
block_size = 128
