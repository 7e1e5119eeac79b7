# Depth scaling: L = 16. The depths 12, 24 and 32 start from this file. For all depths, we choose
# the width of the dense 1B model.
base = "base.py"
tokens_per_step = 2**19     # about 0.5M
max_steps = 19073           # 10B tokens
