# One expert in eight, and one that all tokens share: each as wide, relative to n_embd, as the paper's.
base = "dense_400m.py"
n_experts = 16
top_k = 2
expert_hidden = 64
shared_hidden = 64
