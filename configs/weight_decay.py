# Implicit sparsity, weights: ten times the decay of depth.py. What decay does goes with learning_rate x weight_decay x
# steps, so a run of 1,000 steps takes more of it to show an effect. (paper: decay 0 to 3)
base = "depth.py"
weight_decay = 1.0
