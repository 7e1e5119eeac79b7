# The top of the ladder: + MoE with 64 experts, 8 per token. It has 7.94B parameters, 1.20B active.
# With G = 1 it would have 7.98B and 1.24B. The released recipe says about 7.8B and 1.24B.
base = "ladder_g2.py"
n_experts = 64
top_k = 8
expert_hidden = 1120
lb_loss_weight = 0.01       # our choice: the paper states both weights for moe_1b.py only
z_loss_weight = 0.001
parallel = "fsdp"           # with ddp it does not fit into 80 GB: see --plan
