# The top of the ladder: + MoE with 64 experts, 8 per token, as in the paper. The active FLOPs are
# those of the earlier steps.
base = "ladder_g2.py"
n_experts = 64
top_k = 8
expert_hidden = 32
