# Explicit sparsity, experts: MoE 2B with 400M active. It has 32 experts, 4 per token, and a shared
# expert that every token uses.
base = "dense_400m.py"
n_experts = 32
top_k = 4
expert_hidden = 1536
shared_hidden = 1536
lb_loss_weight = 0.01       # our choice: the paper states both weights for moe_1b.py only
z_loss_weight = 0.001
