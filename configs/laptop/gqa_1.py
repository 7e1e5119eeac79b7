# Explicit sparsity, key/value heads: G = 1 query head per key/value head, that is, multi-head
# attention. With four query heads, G = 1, 2, 4 stand for the paper's 1, 4, 16.
base = "base.py"
