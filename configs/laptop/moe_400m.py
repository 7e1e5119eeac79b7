# Explicit sparsity, experts: 32 with 4 per token, and a shared one that every token uses, as in the paper. Relative
# to n_embd an expert is as wide as in the paper.
base = "dense_400m.py"
n_experts = 32
top_k = 4
expert_hidden = 64
shared_hidden = 64
