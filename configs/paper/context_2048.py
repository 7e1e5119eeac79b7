# Implicit sparsity, attention: T = 2048. The other contexts, 256 to 8192, start from this file.
# L must be 16, because the paper's scores are multiples of 1/16.
base = "base.py"
block_size = 2048
batch_size = 8              # a pass has 16,384 tokens at every T
tokens_per_step = 2**22     # about 4M at every T
max_steps = 2384            # 10B tokens
