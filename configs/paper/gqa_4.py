# Grouped queries: G = 4 query heads per key/value head.
base = "gqa_1.py"
n_kv_head = 4               # G = 4
