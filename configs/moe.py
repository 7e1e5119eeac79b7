# Explicit sparsity, experts: 16 of them, 2 per token, with the active FLOPs of dense.py. (paper: 64 experts, top 8)
base = "dense.py"
n_experts = 16
top_k = 2
expert_hidden = 128
max_steps = 600
