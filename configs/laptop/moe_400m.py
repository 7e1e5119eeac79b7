# Explicit sparsity, experts: 16, top 2, stand for the paper's 32, top 4; and one that all tokens
# share. Each is as wide, relative to n_embd, as the paper's.
base = "dense_400m.py"
n_experts = 16
top_k = 2
expert_hidden = 64
shared_hidden = 64
