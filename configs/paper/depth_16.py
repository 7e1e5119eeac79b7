# Depth scaling, L = 16; 12, 24 and 32 start from this one. That the width stays the dense 1B's is our choice.
base = "base.py"
tokens_per_step = 2**19     # about 0.5M
max_steps = 19073           # 10B tokens
