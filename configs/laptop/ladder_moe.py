# The ladder's top: experts with the active FLOPs of the steps below.
base = "ladder_g2.py"
n_experts = 16
top_k = 2
expert_hidden = 128
