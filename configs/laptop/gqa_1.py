# Explicit sparsity, key/value heads: four query heads, so that G = 1, 2, 4 stand for 1, 4, 16.
base = "base.py"
