base = "ladder_decay_0_3.py"
n_kv_head = 2
