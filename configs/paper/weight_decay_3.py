# Weight decay: 3.
base = "weight_decay_0_1.py"
weight_decay = 3
