# The ladder's top: + MoE, 64 experts, 8 per token, as in the paper, with the active FLOPs of the steps below.
base = "ladder_g2.py"
n_experts = 64
top_k = 8
expert_hidden = 32
