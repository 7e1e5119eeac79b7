# Implicit sparsity, attention: a sixteenth of the paper's context, the same tokens per step whatever it is.
base = "base.py"
block_size = 128
