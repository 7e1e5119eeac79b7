# Explicit sparsity, experts: 16, top 2, stand for the paper's 64, top 8. One in eight is active, as
# there, with the active FLOPs of dense_1b.py.
base = "dense_1b.py"
n_experts = 16
top_k = 2
expert_hidden = 128
