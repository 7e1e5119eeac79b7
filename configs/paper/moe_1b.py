# Explicit sparsity, experts: MoE 7B with 1B active. It has 64 experts, 8 per token.
base = "dense_1b.py"
n_experts = 64
top_k = 8
expert_hidden = 1024        # 6.92B in total, 1.28B active. The released 2048 would give 13.4B
lb_loss_weight = 0.01
z_loss_weight = 0.001
batch_size = 4
parallel = "fsdp"           # with ddp it does not fit into 80 GB: see --plan
