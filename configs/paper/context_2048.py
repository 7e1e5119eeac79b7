# Implicit sparsity, attention: T = 2048; 256 to 8192 start from this one. L = 16: the scores are multiples of 1/16.
base = "base.py"
block_size = 2048
batch_size = 8              # a pass always takes 16,384 tokens
tokens_per_step = 2**22     # about 4M, whatever T is
max_steps = 2384            # 10B tokens
