# Explicit sparsity, experts: 32 experts, 4 per token, and a shared expert that every token uses, as
# in the paper. expert_hidden / n_embd is the paper's, too.
base = "dense_400m.py"
n_experts = 32
top_k = 4
expert_hidden = 64
shared_hidden = 64
