# depth.py with the paper's recipe: longer context, more weight decay, grouped queries (G = 2) and
# experts.
base = "depth.py"
block_size = 512
weight_decay = 0.3
n_kv_head = 2
n_experts = 64
top_k = 8
expert_hidden = 32
max_steps = 400
