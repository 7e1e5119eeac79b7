# The top of the ladder: + MoE with 64 experts and 8 per token, as in the paper. The active FLOPs are those of the
# steps before.
base = "ladder_g2.py"
n_experts = 64
top_k = 8
expert_hidden = 32
