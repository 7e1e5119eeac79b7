# Context: T = 1024.
base = "context_2048.py"
block_size = 1024
batch_size = 16
