# Weight decay: 1.
base = "weight_decay_0_1.py"
weight_decay = 1
