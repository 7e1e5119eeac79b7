# Grouped queries: G = 4 query heads per key/value head stand for the paper's 16.
base = "gqa_1.py"
n_kv_head = 1
