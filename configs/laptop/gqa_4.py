# Grouped queries: G = 2 query heads per key/value head stand for the paper's 4.
base = "gqa_1.py"
n_kv_head = 2
