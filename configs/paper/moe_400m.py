# Explicit sparsity, experts: MoE 2B / 400M active, 32 experts, 4 per token, and one that all tokens share.
base = "dense_400m.py"
n_experts = 32
top_k = 4
expert_hidden = 1536
shared_hidden = 1536
lb_loss_weight = 0.01       # this and the next: stated for moe_1b.py, our choice here
z_loss_weight = 0.001
