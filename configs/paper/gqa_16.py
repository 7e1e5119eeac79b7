# Grouped queries: G = 16 query heads on the one key/value head.
base = "gqa_1.py"
n_kv_head = 1               # G = 16
