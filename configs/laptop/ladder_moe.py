# The top of the ladder: + MoE with 64 experts, 8 per token, as in the paper. Apart from the
# router, the active FLOPs are those of ladder_g2.py.
base = "ladder_g2.py"
n_experts = 64
top_k = 8
expert_hidden = 32
