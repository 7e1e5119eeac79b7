base = "ladder_t4096.py"
weight_decay = 0.192
