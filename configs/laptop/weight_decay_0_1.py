# Implicit sparsity, weights: 0.64 times the paper's decay, see base.py.
base = "base.py"
weight_decay = 0.064
