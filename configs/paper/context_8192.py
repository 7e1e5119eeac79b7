# Context: T = 8192.
base = "context_2048.py"
block_size = 8192
batch_size = 2
