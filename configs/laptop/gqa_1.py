# Explicit sparsity, key/value heads: G = 1 query head for each, plain multi-head attention. There
# are four query heads, so that G = 1, 2, 4 stand for the paper's 1, 4, 16.
base = "base.py"
