# Explicit sparsity, experts: one in eight is active, as in the paper, with the active FLOPs of dense_1b.py.
base = "dense_1b.py"
n_experts = 16
top_k = 2
expert_hidden = 128
