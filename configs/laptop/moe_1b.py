# Explicit sparsity, experts: 64 experts, 8 per token, as in the paper. Apart from the router, the
# active FLOPs are those of dense_1b.py.
base = "dense_1b.py"
n_experts = 64
top_k = 8
expert_hidden = 32
