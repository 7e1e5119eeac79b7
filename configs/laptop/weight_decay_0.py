# Weight decay: none.
base = "weight_decay_0_1.py"
weight_decay = 0
