# The ladder's top: + MoE, 64 experts, 8 per token; 7.8B parameters, 1.24B active.
base = "ladder_g2.py"
n_experts = 64
top_k = 8
expert_hidden = 1120
lb_loss_weight = 0.01
z_loss_weight = 0.001
parallel = "fsdp"           # 8 GPUs of 80 GB cannot hold it otherwise: see --plan
