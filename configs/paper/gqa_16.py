# Grouped queries: G = 16 query heads share the only key/value head.
base = "gqa_1.py"
n_kv_head = 1               # G = 16
