# Explicit sparsity, key/value heads: G = 1 query head per key/value head, that is, multi-head
# attention.
base = "dense_1b.py"
