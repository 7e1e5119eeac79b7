# Weight decay: 1.92 stands for the paper's 3.
base = "weight_decay_0_1.py"
weight_decay = 1.92
