# Implicit sparsity, weights: decay 0.1. The decays 0, 0.01, 1 and 3 start from this file.
# L must be 16, because the paper's scores are multiples of 1/16.
base = "base.py"
weight_decay = 0.1
tokens_per_step = 2**20     # about 1M
max_steps = 9537            # 10B tokens
