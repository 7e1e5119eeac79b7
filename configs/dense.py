# The base of all configs in this folder: a dense model with multi-head attention and Pre-RMSNorm.
data = "data/python"
block_size = 128
n_layer = 8
n_head = 4
n_embd = 64
init_std = 0.113            # 0.02 * sqrt(2048 / n_embd), as in laptop/base.py

max_steps = 1000
tokens_per_step = 2048
learning_rate = 3e-3
warmup_steps = 50
weight_decay = 0.1
