# Weight decay: 0.0064 stands for the paper's 0.01.
base = "weight_decay_0_1.py"
weight_decay = 0.0064
