# Implicit sparsity, weights: decay 0.064 stands for the paper's 0.1. All decays are
# 0.64 times the paper's, see base.py.
base = "base.py"
weight_decay = 0.064
