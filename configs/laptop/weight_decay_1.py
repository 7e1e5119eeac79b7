# Weight decay: 0.64 stands for the paper's 1.
base = "weight_decay_0_1.py"
weight_decay = 0.64
