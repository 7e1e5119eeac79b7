# Implicit sparsity, weights: depth.py with ten times the decay. (paper: decay 0 to 3)
# The effect of decay depends on learning_rate x weight_decay x steps. So a run of only 1,000 steps
# needs a larger decay to show an effect.
base = "depth.py"
weight_decay = 1.0
