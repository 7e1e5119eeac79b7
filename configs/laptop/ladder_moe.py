# The ladder's top: + MoE; 16 experts, top 2, stand for the paper's 64, top 8, with the active FLOPs
# of the steps below.
base = "ladder_g2.py"
n_experts = 16
top_k = 2
expert_hidden = 128
