base = "gqa_1.py"
n_kv_head = 2
