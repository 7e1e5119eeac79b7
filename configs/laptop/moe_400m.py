# Explicit sparsity, experts: 32, 4 per token, as in the paper; and one that all tokens share. Each is as wide, relative
# to n_embd, as the paper's.
base = "dense_400m.py"
n_experts = 32
top_k = 4
expert_hidden = 64
shared_hidden = 64
